"""Find, check and load the compiled kernels, and call them.

Two libraries lie in `lib/`: the schemas with the CPU kernels, and the CUDA kernels (a torch without CUDA cannot load
those). Each carries a mark that names the torch and the sources it was built from; another mark is refused.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
REBUILD = "run `python models/ops/setup.py build` (or `make build`)"
MARK = b"MSDA_BUILT_FOR:"


def library_path(name: str) -> Path:
    """Return where the library of a backend ("cpu" or "cuda") is built."""
    return FOLDER / "lib" / f"libms_deform_attn_{name}.so"


def source_digest() -> str:
    """Hash the C++ and CUDA sources, so that a library built from older ones is noticed."""
    digest = hashlib.sha256()
    for path in sorted((FOLDER / "csrc").iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def expected_mark() -> str:
    """Return what a library that fits this torch and these sources carries."""
    return f"torch-{torch.__version__};sources-{source_digest()}"


@functools.cache
def obstacle(name: str) -> str:
    """Load the library of a backend and say what prevents its use; empty if it is ready.

    Args:
        name: "cpu" or "cuda".
    """
    if name == "cuda":
        if not torch.version.cuda:
            return "this torch is built without CUDA"
        if obstacle("cpu"):  # holds the schemas of both
            return obstacle("cpu")
    path = library_path(name)
    if not path.is_file():
        return f"no compiled library {path.name}: {REBUILD}"
    found, expected = read_mark(path), expected_mark()
    if found != expected:
        return f"{path.name} was built for {found or 'something else'}, expected {expected}: {REBUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error}): {REBUILD}"
    return ""


def read_mark(path: Path) -> str:
    """Read the mark out of a library without loading it; empty if there is none."""
    content = path.read_bytes()
    start = content.find(MARK)
    if start < 0:
        return ""
    start += len(MARK)
    return content[start : content.index(b"\0", start)].decode()


def forward(value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the operator with the compiled kernels; arguments as in reference.forward."""
    shapes = list(chain.from_iterable(level_shapes))
    return torch.ops.dn_detr_kernels.forward(value, shapes, locations, weights)


def backward(
    grad_output: Tensor, value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients with the compiled kernels; arguments as in reference.backward."""
    shapes = list(chain.from_iterable(level_shapes))
    return torch.ops.dn_detr_kernels.backward(grad_output, value, shapes, locations, weights)
