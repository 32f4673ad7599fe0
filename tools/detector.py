"""Load a trained detector from a file alone: weights, options and class names come from inside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import build_model
from tools.convert_checkpoint import class_names, convert, model_options, read_source
from util.checkpoint import local_file
from util.errors import CheckpointError
from util.pretrain import class_count

PostProcessor = Callable[[dict[str, Tensor], Tensor], list[dict[str, Tensor]]]


class Detector(NamedTuple):
    """A model ready to detect, and what its file says about it.

    Attributes:
        model: on its device, in evaluation mode, without gradients.
        postprocess: (outputs, (B, 2) heights and widths) -> per image `scores`, `labels`, `boxes` xyxy in pixels.
        args: options; those of the model and `eval_scale`, `data_aug_max_size`, `label_mapping` are those of the run
            (where the file has them), all others the defaults.
        class_names: of every label, K in all; "class 3" where nobody knows, "N/A" where a label has no category.
        category_ids: of every label in the data set of the run, as its evaluation used them; None where nobody knows.
        averaged: the weights are the average of `--ema`.
    """

    model: nn.Module
    postprocess: PostProcessor
    args: argparse.Namespace
    class_names: list[str]
    category_ids: list[int] | None
    averaged: bool


def load_detector(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    options: Sequence[str] = (),
    averaged: bool | None = None,
) -> Detector:
    """Load a detector for inference.

    Args:
        path: checkpoint of this code base or an official one, a .safetensors file of `tools.convert_checkpoint`, the
            folder of a Hugging Face DAB-DETR or Deformable DETR, or an https address.
        device: where the model goes.
        options: options of main.py that describe the model, for files that do not say, e.g. ["-m", "dab_detr"].
        averaged: take the average of the weights (`--ema`); left out, as the run itself evaluated: where the file
            has one.

    Returns:
        A tuple that starts with (model, postprocess, args, class_names).

    Raises:
        CheckpointError: the file cannot be read, does not describe its model, or holds only a part of a detector.
        SystemExit: main.py refuses the options; it says why on stderr.
    """
    file = local_file(path)
    source = read_source(file, ema=averaged)
    if not source.is_whole:
        raise CheckpointError(
            f"expected a whole detector in {file}, it holds a part ({source.kind}): start a training from it with "
            "--pretrain_model_path"
        )
    args = model_options(source, options)
    weights, _ = convert(source, args, file)
    # Building draws random numbers that the caller's program should not miss.
    with torch.random.fork_rng(devices=[]):
        model, _, postprocessors = build_model(args)
    model.load_state_dict(weights)
    count = class_count(weights) or 0
    names = class_names(source, weights) or [f"class {label}" for label in range(count)]
    categories = source.category_ids or None
    if categories is None and args.label_mapping == "ids":
        categories = range(count)
    return Detector(
        model=model.to(device).eval().requires_grad_(False),
        postprocess=postprocessors["bbox"],
        args=args,
        class_names=names,
        category_ids=None if categories is None else list(categories),
        averaged=source.averaged,
    )
