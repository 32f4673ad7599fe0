"""The deformable decoder: queries attend to a few tokens sampled around their reference points or anchor boxes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from util.box_ops import inverse_sigmoid

from ..layers.anchor_encoding import anchor_sine_embedding
from ..layers.attention import SelfAttention, visible_queries
from ..layers.feed_forward import activated_width, build_activation
from ..layers.mlp import MLP
from ..layers.ms_deform_attn import MSDeformAttn
from .deformable_encoder import TokenLevels


class DeformableDecoderLayer(nn.Module):
    """Self-attention of queries, deformable cross-attention to memory, feed-forward; every sum is followed by its norm.

    The order of the parts is that of the official checkpoints, which has cross-attention first.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        dim_feedforward: int,
        dropout: float,
        activation: str,
    ) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, num_levels, num_heads, num_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = SelfAttention(d_model, num_heads, dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.activation = build_activation(activation)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(activated_width(activation, dim_feedforward), d_model)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        references: Tensor,
        memory: TokenLevels,
        may_attend_queries: Tensor | None,
    ) -> Tensor:
        """Refine (B, Q, C) queries.

        Args:
            query_position: (B, Q, C).
            references: (B, Q, L, 2 or 4) points or boxes on each level, [0, 1] covers a level with its padding.
            may_attend_queries: see `attend`.
        """
        attended = self.self_attn(queries, query_position, may_attend_queries)
        queries = self.norm2(queries + self.dropout2(attended))
        attended = self.cross_attn(
            queries + query_position, references, memory.tokens, memory.shapes, memory.starts, memory.padding_mask
        )
        queries = self.norm1(queries + self.dropout1(attended))
        hidden = self.dropout3(self.activation(self.linear1(queries)))
        return self.norm3(queries + self.dropout4(self.linear2(hidden)))


class DeformableDecoder(nn.Module):
    """Decoder layers with reference points, refined by every layer where there are box heads.

    Deformable DETR (ICLR 2021), "Deformable Transformer Decoder" and "Iterative Bounding Box Refinement". The box heads
    are shared with the detector, which sets `bbox_embed`; official checkpoints hold them under both names.

    Args:
        layer: copied `num_layers` times.
        look_forward_twice: a layer's box also learns from the loss of the next layer (DINO, ICLR 2023, "Look Forward
            Twice"); without it the references handed out are detached.
        eps: of the inverse sigmoid.
    """

    bbox_embed: nn.ModuleList | None
    class_embed: nn.ModuleList | None

    def __init__(
        self, layer: DeformableDecoderLayer, *, num_layers: int, look_forward_twice: bool = False, eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.bbox_embed = None
        self.class_embed = None  # kept here by two-stage models only, where proposals are scored
        self.look_forward_twice, self.eps = look_forward_twice, eps

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: TokenLevels,
        *,
        query_position: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all layers.

        Args:
            queries: (B, Q, C) content.
            references: (B, Q, 2) points as (x, y) or (B, Q, 4) boxes cxcywh in [0, 1], which covers the valid image.
            memory: from the encoder.
            query_position: (B, Q, C) learned positions; anchors carry their own and need none.
            attn_mask: (Q, Q) or (B, Q, Q), True = may not attend.

        Returns:
            hidden states (N, B, Q, C) and the references each of the N layers started from, (B, Q, 2 or 4) each.
        """
        may_attend = visible_queries(attn_mask)
        hidden_states, references_of_layer = [], [references]
        for index, layer in enumerate(self.layers):
            ratios = memory.valid_ratios.repeat(1, 1, references.shape[-1] // 2)
            on_levels = references[:, :, None] * ratios[:, None]
            position = self.position_of_layer(index, queries, on_levels[:, :, 0], query_position)
            queries = layer(queries, position, on_levels, memory, may_attend)
            hidden_states.append(queries)
            if index + 1 < len(self.layers):
                if self.bbox_embed is not None:
                    refined = refine_references(self.bbox_embed[index](queries), references, self.eps)
                    references = refined.detach()
                    references_of_layer.append(refined if self.look_forward_twice else references)
                else:
                    references_of_layer.append(references)
        return torch.stack(hidden_states), references_of_layer

    def position_of_layer(
        self, index: int, queries: Tensor, references: Tensor, query_position: Tensor | None
    ) -> Tensor:
        """Return the (B, Q, C) positions of layer `index`: the learned ones, the same for all layers.

        Args:
            queries: (B, Q, C) content; references: (B, Q, 2 or 4) on the finest level.
            query_position: (B, Q, C).
        """
        assert query_position is not None
        return query_position


class AnchorDeformableDecoder(DeformableDecoder):
    """Deformable decoder whose query positions are embedded anchor boxes (DAB-Deformable-DETR; DAB-DETR, ICLR 2022)."""

    def __init__(
        self,
        layer: DeformableDecoderLayer,
        *,
        num_layers: int,
        d_model: int,
        look_forward_twice: bool = False,
        eps: float = 1e-3,
    ) -> None:
        super().__init__(layer, num_layers=num_layers, look_forward_twice=look_forward_twice, eps=eps)
        self.query_scale = MLP(d_model, d_model, d_model, 2)
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)

    def position_of_layer(
        self, index: int, queries: Tensor, references: Tensor, query_position: Tensor | None
    ) -> Tensor:
        """Embed (B, Q, 4) anchors as (B, Q, C), scaled by the content from the second layer on."""
        sine = anchor_sine_embedding(references, queries.shape[-1] // 2)
        position = self.ref_point_head(sine.to(queries.dtype))
        return position if index == 0 else self.query_scale(queries) * position


def refine_references(offsets_unsigmoid: Tensor, references: Tensor, eps: float) -> Tensor:
    """Add a head's offsets to references before the sigmoid.

    Args:
        offsets_unsigmoid: (..., 4) of a box head.
        references: (..., 4) boxes cxcywh, or (..., 2) points, which move only the centre: the head's width and height
            then stand alone; in [0, 1].
        eps: of the inverse sigmoid.

    Returns:
        boxes (..., 4) cxcywh in [0, 1], float32.
    """
    start = inverse_sigmoid(references.float(), eps)
    return (offsets_unsigmoid.float() + F.pad(start, (0, 4 - start.shape[-1]))).sigmoid()


def predict_layers(
    hidden_states: Tensor,
    references: Sequence[Tensor],
    class_embed: nn.ModuleList,
    bbox_embed: nn.ModuleList,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Apply every layer's own heads.

    Args:
        hidden_states: (N, B, Q, C) and references: N of (B, Q, 2 or 4), from the decoder.
        class_embed, bbox_embed: at least N heads each; more belong to two-stage proposals.
        eps: of the inverse sigmoid.

    Returns:
        logits (N, B, Q, K) and boxes (N, B, Q, 4) cxcywh in [0, 1].
    """
    logits = [head(hidden) for head, hidden in zip(class_embed, hidden_states, strict=False)]
    offsets = [head(hidden) for head, hidden in zip(bbox_embed, hidden_states, strict=False)]
    boxes = [refine_references(offset, start, eps) for offset, start in zip(offsets, references, strict=True)]
    return torch.stack(logits), torch.stack(boxes)
