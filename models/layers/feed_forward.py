"""Activations of the feed-forward blocks, and the blocks' arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# In place: what comes in is the fresh output of a linear layer, the largest tensor of a block.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "gelu": F.gelu, "selu": F.selu, "glu": F.glu}
ACTIVATIONS = (*_FUNCTIONS, "prelu")

# On a CPU so many tokens go through a block at a time: their hidden layer stays in the cache, and the allocator keeps
# its memory instead of asking the system for new pages at every call.
CHUNK = 1024


def build_activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of a feed-forward block; it may overwrite its input.

    "prelu" has one learned slope and is a module.

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


def feed_forward(
    tokens: Tensor, linear1: nn.Linear, activation: Callable[[Tensor], Tensor], linear2: nn.Linear, dropout: nn.Dropout
) -> Tensor:
    """Map (B, S, C) tokens through a hidden layer, (B, S, C) again."""

    def block(part: Tensor) -> Tensor:
        return linear2(dropout(activation(linear1(part))))

    rows, shape = tokens.flatten(0, 1), tokens.shape
    # A graph that is being recorded takes the plain way: a loop over chunks would tie it to one size.
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if recorded or tokens.device.type != "cpu" or rows.shape[0] <= CHUNK:
        return block(rows).view(shape)
    return torch.cat([block(part) for part in rows.split(CHUNK)]).view(shape)
