"""Activation checkpointing: layers forget what they computed and compute it again in the backward pass."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

RESNET_STAGE = r"backbone\.0\.body\.layer\d"


class _Recomputing(nn.Module):
    """Comes before a layer's own class; keeps its arguments only, and its random numbers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the layer's own class does."""
        if not self.training:
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


def recomputing_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of layers that compute as `kind` does, and again in the backward pass."""
    return type(f"Recomputing{kind.__name__}", (_Recomputing, kind), {})


def checkpoint_activations(model: nn.Module) -> list[str]:
    """Let a detector trade time for memory: one more forward pass for a fraction of the activations.

    Encoder layers, decoder layers and the blocks of a ResNet are computed again in the backward pass; names of
    parameters stay as they are. Blocks whose batch norm learns its statistics are left alone: a second pass would
    count every batch twice.

    Args:
        model: a detector, changed in place.

    Returns:
        Names of the modules that are computed again.
    """
    places = ["transformer.encoder.layers", "transformer.decoder.layers"]
    places += [name for name, _ in model.named_modules() if re.fullmatch(RESNET_STAGE, name)]
    names = []
    for place in places:
        for index, layer in model.get_submodule(place).named_children():
            if not any(isinstance(module, _BatchNorm) for module in layer.modules()):
                # The class, not the method: a copy of the model then computes with its own parameters.
                layer.__class__ = recomputing_class(type(layer))
                names.append(f"{place}.{index}")
    return names
