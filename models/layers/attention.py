"""Multi-head attention with official parameter names on torch's fused scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, may_attend: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Mix values by softmax attention, head by head.

    Args:
        query: (B, Q, H * Dk); key: (B, S, H * Dk); value: (B, S, H * Dv), where Dv may differ from Dk.
        num_heads: H.
        may_attend: bool, True = may attend, broadcasts to (B, H, Q, S).
        dropout: rate on the attention weights; pass 0 outside training.

    Returns:
        (B, Q, H * Dv).
    """
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    value_dim = value.shape[-1]
    # On a CPU the kernel that never holds all Q x S weights wants values as wide as keys.
    missing = key.shape[-1] - value_dim if value.device.type == "cpu" else 0
    if missing > 0:
        value = F.pad(value, (0, missing))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=may_attend, dropout_p=dropout)
    if missing > 0:
        mixed = mixed[..., :value_dim]
    return mixed.transpose(1, 2).flatten(2)


def visible_keys(padding_mask: Tensor | None) -> Tensor | None:
    """Turn a (B, S) padding mask (True = padding) into what `attend` takes: (B, 1, 1, S), True = may attend."""
    return None if padding_mask is None else ~padding_mask[:, None, None, :]


def visible_queries(attn_mask: Tensor | None) -> Tensor | None:
    """Turn a (Q, Q) or (B, Q, Q) attention mask (True = may not attend) into what `attend` takes."""
    if attn_mask is None:
        return None
    return ~(attn_mask if attn_mask.ndim == 2 else attn_mask[:, None])


class SelfAttention(nn.Module):
    """Attention of tokens among themselves, positions added to queries and keys only (DETR, ECCV 2020, "Transformer").

    Parameters carry the names of torch.nn.MultiheadAttention, which the official checkpoints use.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"hidden_dim {d_model} must be a multiple of nheads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens: Tensor, position: Tensor | None = None, may_attend: Tensor | None = None) -> Tensor:
        """Attend among tokens.

        Args:
            tokens: (B, S, C).
            position: (B, S, C), added to queries and keys.
            may_attend: see `attend`.

        Returns:
            (B, S, C).
        """
        channels = tokens.shape[-1]
        weight, value_weight = self.in_proj_weight.split([2 * channels, channels])
        bias, value_bias = self.in_proj_bias.split([2 * channels, channels])
        placed = tokens if position is None else tokens + position
        query, key = F.linear(placed, weight, bias).chunk(2, dim=-1)
        value = F.linear(tokens, value_weight, value_bias)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(
            attend(query, key, value, num_heads=self.num_heads, may_attend=may_attend, dropout=dropout)
        )


class ProjectedAttention(nn.Module):
    """Attention whose query, key and value projections live in the caller (Conditional DETR, ICCV 2021).

    Only the output projection is its own, so that the caller can compose content and position per head.
    """

    def __init__(self, value_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.out_proj = nn.Linear(value_dim, value_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, may_attend: Tensor | None = None) -> Tensor:
        """Attend; shapes as in `attend`. Returns (B, Q, value_dim)."""
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(
            attend(query, key, value, num_heads=self.num_heads, may_attend=may_attend, dropout=dropout)
        )
