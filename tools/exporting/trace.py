"""Trace a detector into a program for any batch size, height and width, and write it down as ONNX."""

from __future__ import annotations

import importlib.util
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from models.layers.feature_projection import FeatureProjection
from models.layers.position_encoding import TABLE_SIZE, LearnedPositionEncoding
from util.errors import ExportError

from .wrapper import DETECTIONS, RAW_OUTPUTS, ExportableDetector

OPSET = 18  # the exporter's own choice; sampling of grids, which deformable attention needs, came with 16
LARGEST_BATCH, LARGEST_SIDE = 1024, 8192
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Traced(NamedTuple):
    """A traced detector and the names of what goes in and comes out."""

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]


def require_onnx() -> None:
    """Raise ExportError where a package that ONNX files need is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def side_limits(model: nn.Module) -> tuple[int, int]:
    """Return the smallest and largest height and width in pixels that an exported detector takes.

    On every level there have to be two rows and columns, and in a two-stage detector as many tokens as queries.
    """
    backbone, projection = model.get_submodule("backbone"), model.get_submodule("input_proj")
    strides = list(backbone.strides)  # type: ignore[arg-type]
    if isinstance(projection, FeatureProjection):
        strides += [strides[-1] * 2**i for i in range(1, len(projection) - projection.num_backbone_levels + 1)]
    smallest = strides[-1] + 1
    queries = model.num_queries if is_two_stage(model) else 0
    while sum((-(-smallest // stride)) ** 2 for stride in strides) <= queries:
        smallest += 1
    learned = any(isinstance(module, LearnedPositionEncoding) for module in backbone.modules())
    return smallest, min(LARGEST_SIDE, TABLE_SIZE * strides[0]) if learned else LARGEST_SIDE


def is_two_stage(model: nn.Module) -> bool:
    """Return whether queries start from the best tokens of the encoder."""
    return hasattr(model.get_submodule("transformer"), "enc_output")


def trace(exportable: ExportableDetector, *, with_mask: bool) -> Traced:
    """Trace a detector with torch.export.

    Args:
        exportable: what to trace; with post-processing the program has the input `sizes`.
        with_mask: the program has the input `padding_mask`.

    Raises:
        ExportError: the detector does something whose result depends on the numbers of an example.
    """
    smallest, largest = side_limits(exportable.model)
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    height, width = (Dim(name, min=smallest, max=largest) for name in ("height", "width"))
    example = (min(smallest + 45, largest), min(smallest + 82, largest))
    images = torch.rand((2, 3, *example))
    inputs: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {"images": {0: batch, 2: height, 3: width}}
    if with_mask:
        inputs["padding_mask"] = torch.zeros((2, *example), dtype=torch.bool)
        shapes["padding_mask"] = {0: batch, 1: height, 2: width}
    if exportable.postprocess is not None:
        inputs["sizes"] = torch.tensor([example] * 2)
        shapes["sizes"] = {0: batch}
    try:
        with torch.no_grad(), _sizes_of_pooling_without_guards():
            program = torch.export.export(exportable, (images,), inputs, dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        raise ExportError(f"this model cannot be traced for any picture size: {error}") from error
    outputs = RAW_OUTPUTS if exportable.postprocess is None else DETECTIONS
    return Traced(program, ["images", *inputs], list(outputs))


@contextmanager
def _sizes_of_pooling_without_guards() -> Iterator[None]:
    """Let torch compute the size of a pooled map by one division.

    It rounds a quotient down by looking at the remainder, which ties the program to sizes with the remainder of the
    example. Python's division of whole numbers gives the same number and asks nothing.
    """
    module: Any = torch._meta_registrations
    if hasattr(module, "div_rtn"):
        with mock.patch.object(module, "div_rtn", operator.floordiv):
            yield
    else:
        yield


def write_onnx(traced: Traced, path: Path, metadata: Mapping[str, str]) -> None:
    """Translate a traced detector into ONNX, operators of the standard domain only, and write it.

    Args:
        traced: from `trace`.
        path: file to write.
        metadata: goes into the model's metadata_props.
    """
    import onnxscript.optimizer  # optional: see require_onnx

    with warnings.catch_warnings():
        # torch's exporter copies its own tree of arguments in a way that torch has deprecated.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        translated: Any = torch.onnx.export(
            traced.program,
            dynamo=True,
            input_names=traced.inputs,
            output_names=traced.outputs,
            opset_version=OPSET,
            # Its rules of rewriting lose a bound where one number is clipped twice. Constants are folded below, and
            # runtimes fuse operators by themselves.
            optimize=False,
            verbose=False,
        )
    onnxscript.optimizer.inline(translated.model)
    onnxscript.optimizer.fold_constants(translated.model)
    onnxscript.optimizer.remove_unused_nodes(translated.model)
    translated.model.metadata_props.update(metadata)
    translated.save(str(path))
