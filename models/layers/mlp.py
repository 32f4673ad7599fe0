"""The small multi-layer perceptron of the box heads, anchor embeddings and query scales."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers with relu between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        rows = x.reshape(-1, x.shape[-1])  # once, and not in every layer
        for layer in self.layers[:-1]:
            rows = F.relu(layer(rows))
        rows = self.layers[-1](rows)
        return rows.view(*x.shape[:-1], rows.shape[-1])
