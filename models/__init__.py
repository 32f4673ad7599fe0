"""Detectors: build them by name with `build_model`, or use `dn_components` in a detector of your own."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch import nn

from . import detectors as detectors  # importing the package registers every detector
from .checkpointing import checkpoint_activations
from .compiling import compile_layers
from .registry import get_builder, list_models

__all__ = ["build_model", "list_models"]


def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build the detector named by `args.modelname`.

    Args:
        args: options as `main.parse_args` returns them; `num_classes` None means 91 for `dataset_file` "coco".

    Returns:
        model, criterion and postprocessors ("bbox").

    Raises:
        ValueError: the name is unknown or options do not fit together; the message says which.
    """
    model, criterion, postprocessors = get_builder(args.modelname)(args)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile and not args.eval:  # an evaluation compiles what `prepare_for_inference` makes of the model
        compile_layers(model)
    return model, criterion, postprocessors
