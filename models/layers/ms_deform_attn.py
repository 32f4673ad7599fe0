"""The multi-scale deformable attention module of Deformable DETR (ICLR 2021), with the official parameter names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import ms_deform_attn

# From so many queries on (encoders) one product of 3 parts is faster than one of 2 parts and one of 1, by a tenth on a
# CPU; for the few queries of a decoder putting the weights together costs what it saves.
FUSED_FROM = 4096


class MSDeformAttn(nn.Module):
    """Attend from every query to a few sampled tokens of every level.

    Args:
        d_model: C, channels of queries and tokens.
        n_levels: L, levels of the tokens.
        n_heads: H; must divide d_model.
        n_points: P, samples per query, head and level.

    Raises:
        ValueError: n_heads does not divide d_model.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"expected d_model divisible by n_heads, got {d_model} and {n_heads}: change one of them")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the official initial values: head h looks in direction h, point p lies p + 1 tokens away."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values  # on the unit square, not the circle
        distances = torch.arange(1, self.n_points + 1, dtype=torch.float32).view(1, 1, -1, 1)
        pattern = (directions[:, None, None] * distances).expand(-1, self.n_levels, -1, -1)
        self.sampling_offsets.bias.copy_(pattern.flatten())
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value_tokens: Tensor,
        spatial_shapes: Tensor | Sequence[Sequence[int]],
        level_start_index: Tensor | Sequence[int],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C).
            reference_points: (B, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), [0, 1] covers the level.
                Offsets count in tokens around a point, in halves of the box size over P around a box.
            value_tokens: (B, S, C), one level after the other.
            spatial_shapes: (h, w) of each level; Python integers avoid a synchronisation.
            level_start_index: (L,) first token of each level.
            padding_mask: (B, S) bool, True = padding, whose value counts as zero; None: no padding.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: reference_points has neither 2 nor 4 coordinates.
        """
        batch, tokens, _ = value_tokens.shape
        value = self.value_proj(value_tokens.flatten(0, 1)).view(batch, tokens, self.n_heads, -1)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None, None], 0)
        per_query = (*query.shape[:2], self.n_heads, self.n_levels, self.n_points)
        offsets, logits = self._project(query.flatten(0, 1))
        offsets = offsets.view(*per_query, 2)
        weights = F.softmax(logits.view(*per_query[:3], -1), -1).view(per_query)
        locations = self._locations(reference_points, offsets, spatial_shapes)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights))

    def _project(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Predict offsets (B * Q, H * L * P * 2) and attention logits (B * Q, H * L * P) of (B * Q, C) queries."""
        first, second = self.sampling_offsets, self.attention_weights
        if query.shape[0] < FUSED_FROM:
            return first(query), second(query)
        weight, bias = torch.cat([first.weight, second.weight]), torch.cat([first.bias, second.bias])
        offsets, logits = F.linear(query, weight, bias).split([first.out_features, second.out_features], -1)
        return offsets, logits

    def _locations(
        self, reference_points: Tensor, offsets: Tensor, spatial_shapes: Tensor | Sequence[Sequence[int]]
    ) -> Tensor:
        """Place offsets (B, Q, H, L, P, 2) around the reference points: (B, Q, H, L, P, 2), [0, 1] covers a level."""
        if reference_points.shape[-1] == 2:
            # Not as_tensor, which would tie compiled code to one size of pictures.
            sizes = spatial_shapes if isinstance(spatial_shapes, Tensor) else torch.tensor(spatial_shapes)
            # The host must not wait for the GPU.
            sizes = sizes.to(offsets.device, reference_points.dtype, non_blocking=True).flip(-1)
            # Written as rows of L * P * 2 numbers: broadcasting over rows is vectorised, over pairs it is not.
            rows = [each.unsqueeze(-2).expand(*each.shape[:-1], self.n_points, 2) for each in (sizes, reference_points)]
            placed = rows[1].flatten(2)[:, :, None] + offsets.flatten(3) / rows[0].flatten()
            return placed.view_as(offsets)
        if reference_points.shape[-1] == 4:
            anchors = reference_points[:, :, None, :, None]
            return anchors[..., :2] + offsets / self.n_points * anchors[..., 2:] * 0.5
        raise ValueError(f"expected reference_points with 2 or 4 coordinates, got {reference_points.shape[-1]}")
