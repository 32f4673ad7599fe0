"""Activations of the feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "selu": F.selu, "glu": F.glu}
ACTIVATIONS = (*_FUNCTIONS, "prelu")


def build_activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of a feed-forward block; "prelu" has one learned slope and is a module.

    Raises:
        ValueError: the name is none of `ACTIVATIONS`.
    """
    if name == "prelu":
        return nn.PReLU()
    if name not in _FUNCTIONS:
        raise ValueError(f"transformer activation '{name}' is unknown: expected one of {', '.join(ACTIVATIONS)}")
    return _FUNCTIONS[name]


def activated_width(name: str, dim_feedforward: int) -> int:
    """Return the width after the activation: glu gates one half with the other and so halves it."""
    return dim_feedforward // 2 if name == "glu" else dim_feedforward
