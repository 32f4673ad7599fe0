"""The deformable decoder: queries attend to a few tokens sampled around their reference points or anchor boxes."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from util.box_ops import inverse_sigmoid

from ..layers.anchor_encoding import anchor_sine_embedding
from ..layers.attention import SelfAttention, visible_queries
from ..layers.feed_forward import activated_width, build_activation, feed_forward
from ..layers.mlp import MLP
from ..layers.ms_deform_attn import MSDeformAttn
from .deformable_encoder import TokenLevels
from .layer_sizes import LayerSizes


class DeformableDecoderLayer(nn.Module):
    """Self-attention of queries, deformable cross-attention to memory, feed-forward; every sum is followed by its norm.

    The order of the parts is that of the official checkpoints, which has cross-attention first.
    """

    def __init__(self, sizes: LayerSizes, *, num_levels: int, num_points: int) -> None:
        super().__init__()
        d_model, dropout = sizes.d_model, sizes.dropout
        self.cross_attn = MSDeformAttn(d_model, num_levels, sizes.num_heads, num_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = SelfAttention(d_model, sizes.num_heads, dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, sizes.dim_feedforward)
        self.activation = build_activation(sizes.activation)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(activated_width(sizes.activation, sizes.dim_feedforward), d_model)
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
        hidden = feed_forward(queries, self.linear1, self.activation, self.linear2, self.dropout3)
        return self.norm3(queries + self.dropout4(hidden))


class Decoded(NamedTuple):
    """What the N layers of a deformable decoder made of the queries.

    Attributes:
        hidden_states: (B, Q, C) each.
        references: what each layer started from, (B, Q, 2 or 4) each, in [0, 1].
        boxes: predictions (B, Q, 4) cxcywh in [0, 1], float32.
    """

    hidden_states: list[Tensor]
    references: list[Tensor]
    boxes: list[Tensor]


class DeformableDecoder(nn.Module):
    """Decoder layers with reference points; where `bbox_embed` is set, every layer starts from the boxes before it.

    Deformable DETR (ICLR 2021), "Deformable Transformer Decoder" and "Iterative Bounding Box Refinement". The box heads
    are the detector's, which sets `bbox_embed` to them to refine; official checkpoints then hold them under both names.

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
        box_heads: nn.ModuleList,
        *,
        query_position: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Decoded:
        """Run all layers.

        Args:
            queries: (B, Q, C) content.
            references: (B, Q, 2) points as (x, y) or (B, Q, 4) boxes cxcywh in [0, 1], which covers the valid image.
            memory: from the encoder.
            box_heads: one per layer; more belong to two-stage proposals.
            query_position: (B, Q, C) learned positions; anchors carry their own and need none.
            attn_mask: (Q, Q) or (B, Q, Q), True = may not attend.

        Returns:
            what every layer made of the queries.
        """
        may_attend = visible_queries(attn_mask)
        decoded = Decoded([], [], [])
        start = references
        for index, (layer, box_head) in enumerate(zip(self.layers, box_heads, strict=False)):
            ratios = memory.valid_ratios.repeat(1, 1, references.shape[-1] // 2)
            on_levels = references[:, :, None] * ratios[:, None]
            position = self.position_of_layer(index, queries, on_levels[:, :, 0], query_position)
            queries = layer(queries, position, on_levels, memory, may_attend)
            offsets = box_head(queries)
            boxes = refine_references(offsets, start, self.eps)
            decoded.hidden_states.append(queries)
            decoded.references.append(start)
            decoded.boxes.append(boxes)
            if self.bbox_embed is not None:
                # Looking forward twice a layer learns from the next one's boxes, and from no later ones.
                start = refine_references(offsets, references, self.eps) if self.look_forward_twice else boxes.detach()
                references = boxes.detach()
        return decoded

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
    if start.shape[-1] == 2:
        start = F.pad(start, (0, 2))
    return (offsets_unsigmoid.float() + start).sigmoid()
