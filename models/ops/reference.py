"""Multi-scale deformable attention in plain PyTorch: the definition every other backend is judged by.

Deformable DETR, ICLR 2021, "Multi-scale Deformable Attention Module". A location (x, y) in [0, 1] of a level of h x w
tokens means the pixel position (x * w - 0.5, y * h - 0.5); the four surrounding tokens are mixed bilinearly and tokens
outside the level count as zero. A location that is NaN, infinite or further than one token outside samples nothing:
it adds zero to the output and gets zero gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Every level is at least one token wide: beyond 1.5 (or below -0.5) nothing is left to sample.
SURELY_OUTSIDE = 2.0


def compute_dtype(value_dtype: torch.dtype) -> torch.dtype:
    """Return the type the operator computes in: float64 for float64, float32 for everything smaller."""
    return torch.float64 if value_dtype == torch.float64 else torch.float32


def forward(value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted sum of the sampled values.

    Args:
        value: (B, S, H, D) tokens of all levels, one level after the other.
        level_shapes: (h, w) of each of the L levels, S = sum of h * w.
        locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] covers the level.
        weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D) in the type of value. Differentiable by autograd.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    dtype = compute_dtype(value.dtype)
    maps = _split_levels(value.to(dtype), level_shapes)
    grids = _grids(locations.to(dtype))
    sampled = torch.stack(
        [F.grid_sample(m, g, padding_mode="zeros", align_corners=False) for m, g in zip(maps, grids, strict=True)],
        dim=-2,
    )
    per_head = weights.to(dtype).transpose(1, 2).flatten(3).flatten(0, 1).unsqueeze(1)
    output = (sampled.flatten(-2) * per_head).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous().to(value.dtype)


def backward(
    grad_output: Tensor, value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`, spelt out so that it runs below autograd.

    Args:
        grad_output: (B, Q, H * D); the others as in `forward`.

    Returns:
        Gradients of value, locations and weights, each in the shape and type of its tensor.
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    dtype = compute_dtype(value.dtype)
    maps = _split_levels(value.to(dtype), level_shapes)
    grids = _grids(locations.to(dtype))
    grad_out = grad_output.to(dtype).view(batch, queries, heads, channels).permute(0, 2, 3, 1)
    grad_out = grad_out.reshape(batch * heads, channels, queries, 1)
    per_head = weights.to(dtype).permute(0, 2, 3, 1, 4).flatten(0, 1)
    grad_maps, grad_grids, grad_weights = [], [], []
    for level, (tokens, grid) in enumerate(zip(maps, grids, strict=True)):
        sampled = F.grid_sample(tokens, grid, padding_mode="zeros", align_corners=False)
        grad_weights.append((sampled * grad_out).sum(1))
        grad_sampled = grad_out * per_head[:, level].unsqueeze(1)
        grad_tokens, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_sampled, tokens, grid, 0, 0, False, [True, True]
        )
        grad_maps.append(grad_tokens.flatten(2))
        grad_grids.append(2 * grad_grid)
    grad_value = torch.cat(grad_maps, 2).view(batch, heads, channels, value.shape[1]).permute(0, 3, 1, 2)
    per_query = (batch, heads, queries, len(grids), points)
    grad_locations = torch.stack(grad_grids, 2).view(*per_query, 2).transpose(1, 2)
    # grid_sample multiplies by zero where nothing is sampled, which keeps a NaN of the location alive.
    grad_locations = grad_locations.masked_fill(~_may_sample(locations), 0)
    grad_attention = torch.stack(grad_weights, 2).view(per_query).transpose(1, 2)
    return (
        grad_value.contiguous().to(value.dtype),
        grad_locations.contiguous().to(locations.dtype),
        grad_attention.contiguous().to(weights.dtype),
    )


def _may_sample(locations: Tensor) -> Tensor:
    """Return bool (..., 1): False where a coordinate is NaN, infinite or certainly outside every level."""
    return (locations.abs() < SURELY_OUTSIDE).all(-1, keepdim=True)


def _split_levels(value: Tensor, level_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split (B, S, H, D) into one (B * H, D, h, w) map per level."""
    starts = [0]
    for height, width in level_shapes:
        starts.append(starts[-1] + height * width)
    return [
        value[:, start:end].permute(0, 2, 3, 1).reshape(value.shape[0] * value.shape[2], value.shape[3], *shape)
        for (start, end), shape in zip(pairwise(starts), level_shapes, strict=True)
    ]


def _grids(locations: Tensor) -> list[Tensor]:
    """Turn (B, Q, H, L, P, 2) in [0, 1] into one (B * H, Q, P, 2) grid_sample grid in [-1, 1] per level."""
    inside = torch.where(_may_sample(locations), locations, SURELY_OUTSIDE)
    grids = (2 * inside - 1).transpose(1, 2).flatten(0, 1)
    return list(grids.unbind(2))
