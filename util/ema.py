"""A running average of the weights, often better than the weights themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class ModelEma:
    """Exponential moving average of a model's parameters; buffers are copied.

    The decay rises as (1 + n) / (10 + n) after n updates up to its final value, so that short runs do not average in
    the initial weights.

    Args:
        model: what to average; the average starts as a copy.
        decay: final share of the old average, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        average = [parameter.detach() for parameter in self.module.parameters()]
        torch._foreach_lerp_(average, [parameter.detach() for parameter in model.parameters()], 1 - decay)
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)

    def restart_from(self, model: nn.Module) -> None:
        """Forget the average and start again at the model's weights."""
        self.module.load_state_dict(model.state_dict())
        self.num_updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"model": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        self.module.load_state_dict(state["model"])
        self.num_updates = state["num_updates"]
