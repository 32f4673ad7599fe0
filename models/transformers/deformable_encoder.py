"""The deformable encoder: every token of every level attends to a few sampled tokens of all levels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.feature_projection import ProjectedLevels
from ..layers.feed_forward import activated_width, build_activation, feed_forward
from ..layers.ms_deform_attn import MSDeformAttn
from .layer_sizes import LayerSizes


class TokenLevels(NamedTuple):
    """Tokens of all levels, one level after the other, finest first; S = sum of h_i * w_i.

    Attributes:
        tokens: (B, S, C).
        position: (B, S, C) position encoding without the level embedding.
        padding_mask: (B, S) bool, True = padding; None where there is no padding.
        valid_ratios: (B, L, 2) float32, valid share of width and height of each level, in (0, 1].
        shapes: (h, w) of each level as Python integers, so that nothing has to be read back from the device.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Tensor | None
    valid_ratios: Tensor
    shapes: list[tuple[int, int]]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each level, adding up to S."""
        return [height * width for height, width in self.shapes]

    @property
    def starts(self) -> list[int]:
        """Index of the first token of each level."""
        starts = [0]
        for length in self.lengths[:-1]:
            starts.append(starts[-1] + length)
        return starts


def flatten_levels(levels: ProjectedLevels) -> TokenLevels:
    """Lay the feature maps of all levels out as one row of tokens."""
    return TokenLevels(
        tokens=torch.cat([source.flatten(2).transpose(1, 2) for source in levels.sources], dim=1),
        position=torch.cat([position.flatten(2).transpose(1, 2) for position in levels.positions], dim=1),
        padding_mask=torch.cat([mask.flatten(1) for mask in levels.masks], dim=1) if levels.padded else None,
        valid_ratios=valid_ratios(levels),
        shapes=[(mask.shape[1], mask.shape[2]) for mask in levels.masks],
    )


def valid_ratios(levels: ProjectedLevels) -> Tensor:
    """Return the share of width and height of every level that is no padding, (B, L, 2) as (x, y)."""
    if not levels.padded:
        first = levels.masks[0]
        return torch.ones(first.shape[0], len(levels.masks), 2, device=first.device)
    return torch.stack([valid_ratio(mask) for mask in levels.masks], dim=1)


def valid_ratio(padding_mask: Tensor) -> Tensor:
    """Return the share of width and height that is no padding, (B, 2) as (x, y), of a (B, h, w) mask."""
    height, width = padding_mask.shape[1:]
    valid = ~padding_mask
    return torch.stack((valid[:, 0].sum(1) / width, valid[:, :, 0].sum(1) / height), dim=-1)


def encoder_reference_points(shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Return where each token lies on each level.

    Args:
        shapes: (h, w) of the levels; valid_ratios: (B, L, 2).

    Returns:
        (B, S, L, 2) as (x, y), [0, 1] covers a level with its padding.
    """
    points = [token_centres(shape, ratio) for shape, ratio in zip(shapes, valid_ratios.unbind(1), strict=True)]
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]


def token_centres(shape: tuple[int, int], ratio: Tensor) -> Tensor:
    """Return the centres of the tokens of one level relative to the image without padding.

    Args:
        shape: (h, w); ratio: (B, 2) valid share of width and height.

    Returns:
        (B, h * w, 2) as (x, y); tokens on padding lie beyond 1.
    """
    height, width = shape
    y = (torch.arange(height, dtype=ratio.dtype, device=ratio.device) + 0.5) / (ratio[:, 1:] * height)
    x = (torch.arange(width, dtype=ratio.dtype, device=ratio.device) + 0.5) / (ratio[:, :1] * width)
    # Spread by views: exporters to ONNX get repeat_interleave by a variable number wrong.
    return torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1).flatten(1, 2)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward block, each followed by its norm (Deformable DETR, ICLR 2021)."""

    def __init__(self, sizes: LayerSizes, *, num_levels: int, num_points: int) -> None:
        super().__init__()
        d_model, dropout = sizes.d_model, sizes.dropout
        self.self_attn = MSDeformAttn(d_model, num_levels, sizes.num_heads, num_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, sizes.dim_feedforward)
        self.activation = build_activation(sizes.activation)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(activated_width(sizes.activation, sizes.dim_feedforward), d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor, position: Tensor, reference_points: Tensor, levels: TokenLevels) -> Tensor:
        """Refine (B, S, C) tokens; position (B, S, C) enters the queries, reference_points are (B, S, L, 2)."""
        attended = self.self_attn(
            tokens + position, reference_points, tokens, levels.shapes, levels.starts, levels.padding_mask
        )
        tokens = self.norm1(tokens + self.dropout1(attended))
        hidden = feed_forward(tokens, self.linear1, self.activation, self.linear2, self.dropout2)
        return self.norm2(tokens + self.dropout3(hidden))


class DeformableEncoder(nn.Module):
    """Deformable encoder layers ("Deformable Transformer Encoder")."""

    def __init__(self, layer: DeformableEncoderLayer, *, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))

    def forward(self, levels: TokenLevels, level_embed: Tensor) -> TokenLevels:
        """Return the levels with refined tokens; level_embed (L, C) tells tokens of different levels apart."""
        reference_points = encoder_reference_points(levels.shapes, levels.valid_ratios)
        of_level = torch.cat([row.expand(length, -1) for row, length in zip(level_embed, levels.lengths, strict=True)])
        position = levels.position + of_level
        tokens = levels.tokens
        for layer in self.layers:
            tokens = layer(tokens, position, reference_points, levels)
        return levels._replace(tokens=tokens)
