"""The DAB-DETR decoder: queries are anchor boxes, refined layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from util.box_ops import inverse_sigmoid

from ..layers.anchor_encoding import anchor_sine_embedding
from ..layers.attention import ProjectedAttention, visible_keys, visible_queries
from ..layers.feed_forward import activated_width, build_activation, feed_forward
from ..layers.mlp import MLP


class DabDecoderLayer(nn.Module):
    """Self-attention of queries, cross-attention to memory, feed-forward; every sum is followed by its norm.

    Content and position have their own projections (Conditional DETR, ICCV 2021, "Conditional cross-attention");
    in cross-attention they are concatenated head by head, so that their products add up instead of mixing.
    """

    def __init__(self, *, d_model: int, num_heads: int, dim_feedforward: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.sa_qcontent_proj = nn.Linear(d_model, d_model)
        self.sa_qpos_proj = nn.Linear(d_model, d_model)
        self.sa_kcontent_proj = nn.Linear(d_model, d_model)
        self.sa_kpos_proj = nn.Linear(d_model, d_model)
        self.sa_v_proj = nn.Linear(d_model, d_model)
        self.self_attn = ProjectedAttention(d_model, num_heads, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.ca_qcontent_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_proj: nn.Linear | None = nn.Linear(d_model, d_model)
        self.ca_kcontent_proj = nn.Linear(d_model, d_model)
        self.ca_kpos_proj = nn.Linear(d_model, d_model)
        self.ca_v_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_sine_proj = nn.Linear(d_model, d_model)
        self.cross_attn = ProjectedAttention(d_model, num_heads, dropout)
        self.num_heads = num_heads
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(activated_width(activation, dim_feedforward), d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = build_activation(activation)

    def forward(
        self,
        queries: Tensor,
        memory: Tensor,
        *,
        query_position: Tensor,
        query_sine: Tensor,
        memory_position: Tensor,
        may_attend_queries: Tensor | None,
        may_attend_memory: Tensor | None,
    ) -> Tensor:
        """Refine (B, Q, C) queries against (B, S, C) memory.

        Args:
            query_position: (B, Q, C) learned embedding of the anchors.
            query_sine: (B, Q, C) modulated sine embedding of the anchor centres.
            memory_position: (B, S, C) position encoding of the memory.
            may_attend_queries, may_attend_memory: see `attend`.
        """
        attended = self.attend_queries(queries, query_position, may_attend_queries)
        queries = self.norm1(queries + self.dropout1(attended))
        attended = self.attend_memory(queries, memory, query_position, query_sine, memory_position, may_attend_memory)
        queries = self.norm2(queries + self.dropout2(attended))
        hidden = feed_forward(queries, self.linear1, self.activation, self.linear2, self.dropout)
        return self.norm3(queries + self.dropout3(hidden))

    def attend_queries(self, queries: Tensor, query_position: Tensor, may_attend: Tensor | None) -> Tensor:
        """Self-attention: content and position are added before the product."""
        query = self.sa_qcontent_proj(queries) + self.sa_qpos_proj(query_position)
        key = self.sa_kcontent_proj(queries) + self.sa_kpos_proj(query_position)
        return self.self_attn(query, key, self.sa_v_proj(queries), may_attend)

    def attend_memory(
        self,
        queries: Tensor,
        memory: Tensor,
        query_position: Tensor,
        query_sine: Tensor,
        memory_position: Tensor,
        may_attend: Tensor | None,
    ) -> Tensor:
        """Cross-attention: content and sine embedding stand side by side in every head."""
        query, key = self.ca_qcontent_proj(queries), self.ca_kcontent_proj(memory)
        key_position = self.ca_kpos_proj(memory_position)
        if self.ca_qpos_proj is not None:
            query = query + self.ca_qpos_proj(query_position)
            key = key + key_position
        query = self._join_heads(query, self.ca_qpos_sine_proj(query_sine))
        key = self._join_heads(key, key_position)
        return self.cross_attn(query, key, self.ca_v_proj(memory), may_attend)

    def _join_heads(self, content: Tensor, position: Tensor) -> Tensor:
        heads = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, position)]
        return torch.cat(heads, dim=-1).flatten(-2)


class DabDecoder(nn.Module):
    """Decoder layers with width- and height-modulated attention and anchors updated by every layer.

    DAB-DETR (ICLR 2022), "Width & height-modulated Gaussian kernel" and "Anchor update". The box head is shared with
    the detector, which sets `bbox_embed`; official checkpoints hold it under both names.
    """

    bbox_embed: Callable[[Tensor], Tensor]

    def __init__(self, layer: nn.Module, *, num_layers: int, d_model: int) -> None:
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
        padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            queries: (B, Q, C) content; anchors_unsigmoid: (B, Q, 4) cxcywh before the sigmoid.
            memory, memory_position: (B, S, C); padding_mask: (B, S), True = padding.
            attn_mask: (Q, Q) or (B, Q, Q), True = may not attend.

        Returns:
            hidden states after the final norm (N, B, Q, C) and the anchors each of the N layers started from
            (N, B, Q, 4) in [0, 1].
        """
        sight = {
            "memory_position": memory_position,
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
