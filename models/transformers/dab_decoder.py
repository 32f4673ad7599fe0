"""The DAB-DETR decoder: queries are anchor boxes, refined layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from util.box_ops import inverse_sigmoid

from ..layers.anchor_encoding import anchor_sine_embedding
from ..layers.attention import ProjectedAttention, visible_keys, visible_queries
from ..layers.mlp import MLP
from .dab_layer import DabLayer
from .layer_sizes import LayerSizes


class DabDecoderLayer(DabLayer):
    """A decoder layer that attends to the whole memory at once."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__(sizes)
        self.cross_attn = ProjectedAttention(sizes.d_model, sizes.num_heads, sizes.dropout)
        self.add_feed_forward(sizes)

    def gather(self, query: Tensor, key: Tensor, value: Tensor, may_attend: Tensor | None, **_: Any) -> Tensor:
        """Attend to all tokens alike; levels are not told apart."""
        return self.cross_attn(query, key, value, may_attend)


class DabDecoder(nn.Module):
    """Decoder layers with width- and height-modulated attention and anchors updated by every layer.

    DAB-DETR (ICLR 2022), "Width & height-modulated Gaussian kernel" and "Anchor update". The box head is shared with
    the detector, which sets `bbox_embed`; official checkpoints hold it under both names.
    """

    bbox_embed: Callable[[Tensor], Tensor]

    def __init__(self, layer: DabLayer, *, num_layers: int, d_model: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        for later in self.layers[1:]:
            # From the second layer on content alone asks, as in Conditional DETR.
            later.register_module("ca_qpos_proj", None)
        self.norm = nn.LayerNorm(d_model)
        self.query_scale = MLP(d_model, d_model, d_model, 2)
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)
        self.ref_anchor_head = MLP(d_model, d_model, 2, 2)

    def forward(
        self,
        queries: Tensor,
        anchors_unsigmoid: Tensor,
        memory: Tensor,
        *,
        memory_position: Tensor,
        level_lengths: list[int],
        padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            queries: (B, Q, C) content; anchors_unsigmoid: (B, Q, 4) cxcywh before the sigmoid.
            memory, memory_position: (B, S, C); padding_mask: (B, S), True = padding.
            level_lengths: tokens of each level of the memory, adding up to S.
            attn_mask: (Q, Q) or (B, Q, Q), True = may not attend.

        Returns:
            hidden states after the final norm (N, B, Q, C) and the anchors each of the N layers started from
            (N, B, Q, 4) in [0, 1].
        """
        sight = {
            "memory_position": memory_position,
            "level_lengths": level_lengths,
            "may_attend_queries": visible_queries(attn_mask),
            "may_attend_memory": visible_keys(padding_mask),
        }
        anchors = anchors_unsigmoid.sigmoid()
        hidden_states, anchors_of_layer = [], [anchors]
        for index, layer in enumerate(self.layers):
            sine = anchor_sine_embedding(anchors, queries.shape[-1] // 2)
            query_position = self.ref_point_head(sine.to(queries.dtype))
            query_sine = self.modulate(sine[..., : queries.shape[-1]], queries, anchors, scale=index > 0)
            queries = layer(queries, memory, query_position=query_position, query_sine=query_sine, **sight)
            hidden_states.append(self.norm(queries))
            if index + 1 < len(self.layers):
                refined = refine_boxes(self.bbox_embed(queries), anchors)
                # Not detached here, so that this layer's box also learns from the next layer's loss;
                # detached for the next layer's attention.
                anchors_of_layer.append(refined)
                anchors = refined.detach()
        return torch.stack(hidden_states), torch.stack(anchors_of_layer)

    def modulate(self, sine: Tensor, queries: Tensor, anchors: Tensor, *, scale: bool) -> Tensor:
        """Scale the (B, Q, C) sine embedding of the centres by content and by the anchors' width and height.

        The y half is multiplied by reference height / h, the x half by reference width / w, both references read
        from the query. `scale` adds the content's query scale (all layers but the first).
        """
        half = queries.shape[-1] // 2
        if scale:
            sine = sine * self.query_scale(queries)
        reference_wh = self.ref_anchor_head(queries).sigmoid()
        y_factor = reference_wh[..., 1:2] / anchors[..., 3:4]
        x_factor = reference_wh[..., 0:1] / anchors[..., 2:3]
        return torch.cat((sine[..., :half] * y_factor, sine[..., half:] * x_factor), dim=-1).to(queries.dtype)


def refine_boxes(offsets_unsigmoid: Tensor, anchors: Tensor, eps: float = 1e-3) -> Tensor:
    """Add a head's (..., 4) offsets to anchors (..., 4 in [0, 1]) before the sigmoid; returns boxes in [0, 1]."""
    return (offsets_unsigmoid.float() + inverse_sigmoid(anchors.float(), eps)).sigmoid()
