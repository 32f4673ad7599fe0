"""What the decoder layers of the DAB kind share: all but the way queries gather what they find in the memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.attention import ProjectedAttention
from ..layers.feed_forward import activated_width, build_activation, feed_forward
from .layer_sizes import LayerSizes


class DabLayer(nn.Module):
    """Self-attention of queries, cross-attention to memory, feed-forward; every sum is followed by its norm.

    Content and position have their own projections (Conditional DETR, ICCV 2021, "Conditional cross-attention");
    in cross-attention they are concatenated head by head, so that their products add up instead of mixing.

    A kind of layer has parts of its own and computes with them in `gather`. They are registered before
    `add_feed_forward` is called: the order of the official checkpoints.
    """

    ca_qpos_proj: nn.Linear | None

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        d_model, dropout = sizes.d_model, sizes.dropout
        self.num_heads = sizes.num_heads
        self.sa_qcontent_proj = nn.Linear(d_model, d_model)
        self.sa_qpos_proj = nn.Linear(d_model, d_model)
        self.sa_kcontent_proj = nn.Linear(d_model, d_model)
        self.sa_kpos_proj = nn.Linear(d_model, d_model)
        self.sa_v_proj = nn.Linear(d_model, d_model)
        self.self_attn = ProjectedAttention(d_model, sizes.num_heads, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.ca_qcontent_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_proj = nn.Linear(d_model, d_model)
        self.ca_kcontent_proj = nn.Linear(d_model, d_model)
        self.ca_kpos_proj = nn.Linear(d_model, d_model)
        self.ca_v_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_sine_proj = nn.Linear(d_model, d_model)

    def add_feed_forward(self, sizes: LayerSizes) -> None:
        """Register what comes after the parts of cross-attention."""
        d_model, dropout = sizes.d_model, sizes.dropout
        self.linear1 = nn.Linear(d_model, sizes.dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(activated_width(sizes.activation, sizes.dim_feedforward), d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = build_activation(sizes.activation)

    def forward(
        self,
        queries: Tensor,
        memory: Tensor,
        *,
        query_position: Tensor,
        query_sine: Tensor,
        memory_position: Tensor,
        level_lengths: list[int],
        may_attend_queries: Tensor | None,
        may_attend_memory: Tensor | None,
    ) -> Tensor:
        """Refine (B, Q, C) queries against (B, S, C) memory.

        Args:
            query_position: (B, Q, C) learned embedding of the anchors.
            query_sine: (B, Q, C) modulated sine embedding of the anchor centres.
            memory_position: (B, S, C) position encoding of the memory.
            level_lengths: tokens of each level of the memory, adding up to S.
            may_attend_queries, may_attend_memory: see `attend`.
        """
        asked = self.sa_qcontent_proj(queries) + self.sa_qpos_proj(query_position)
        key = self.sa_kcontent_proj(queries) + self.sa_kpos_proj(query_position)
        attended = self.self_attn(asked, key, self.sa_v_proj(queries), may_attend_queries)
        queries = self.norm1(queries + self.dropout1(attended))
        query, key = self.compose(queries, memory, query_position, query_sine, memory_position)
        attended = self.gather(
            query, key, self.ca_v_proj(memory), may_attend_memory, asked=asked, level_lengths=level_lengths
        )
        queries = self.norm2(queries + self.dropout2(attended))
        hidden = feed_forward(queries, self.linear1, self.activation, self.linear2, self.dropout)
        return self.norm3(queries + self.dropout3(hidden))

    def compose(
        self, queries: Tensor, memory: Tensor, query_position: Tensor, query_sine: Tensor, memory_position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return query (B, Q, 2C) and key (B, S, 2C) of cross-attention: content beside position in every head."""
        query, key = self.ca_qcontent_proj(queries), self.ca_kcontent_proj(memory)
        key_position = self.ca_kpos_proj(memory_position)
        if self.ca_qpos_proj is not None:
            query = query + self.ca_qpos_proj(query_position)
            key = key + key_position
        return self._join_heads(query, self.ca_qpos_sine_proj(query_sine)), self._join_heads(key, key_position)

    def gather(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        may_attend: Tensor | None,
        *,
        asked: Tensor,
        level_lengths: list[int],
    ) -> Tensor:
        """Return what the queries find in the memory, (B, Q, C).

        Args:
            query: (B, Q, 2C), key: (B, S, 2C), value: (B, S, C), may_attend: see `attend`.
            asked: (B, Q, C) query of the self-attention.
            level_lengths: tokens of each level, adding up to S.
        """
        raise NotImplementedError

    def _join_heads(self, content: Tensor, position: Tensor) -> Tensor:
        heads = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, position)]
        return torch.cat(heads, dim=-1).flatten(-2)
