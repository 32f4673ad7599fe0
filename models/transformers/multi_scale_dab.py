"""The encoder-only deformable transformer: deformable encoder, dense DAB decoder over all levels of its memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.attention import ProjectedAttention, attend
from ..layers.feature_projection import ProjectedLevels
from ..layers.feed_forward import activated_width, build_activation, feed_forward
from .dab_decoder import DabDecoder
from .deformable_encoder import DeformableEncoder, DeformableEncoderLayer, TokenLevels, flatten_levels


class MultiScaleDabDecoderLayer(nn.Module):
    """A DAB decoder layer that attends to every level by itself and mixes what it finds.

    The attention of one level competes only within that level; one softmax over levels, read from the query of the
    self-attention, weighs the results. The projections are shared by all levels. The order of the parts is that of the
    official checkpoints.
    """

    ca_qpos_proj: nn.Linear | None

    def __init__(
        self, *, d_model: int, num_heads: int, num_levels: int, dim_feedforward: int, dropout: float, activation: str
    ) -> None:
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
        self.ca_qpos_proj = nn.Linear(d_model, d_model)
        self.ca_kcontent_proj = nn.Linear(d_model, d_model)
        self.ca_kpos_proj = nn.Linear(d_model, d_model)
        self.ca_v_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_sine_proj = nn.Linear(d_model, d_model)
        self.ca_out_v_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.ca_out_v_proj.bias)
        self.lvl_attn = nn.Linear(d_model, num_levels)
        self.num_heads, self.attention_dropout = num_heads, dropout
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
        memory: TokenLevels,
        *,
        query_position: Tensor,
        query_sine: Tensor,
        memory_position: Tensor,
        may_attend_queries: Tensor | None,
        may_attend_memory: Tensor | None,
    ) -> Tensor:
        """Refine (B, Q, C) queries against the memory.

        Args:
            query_position: (B, Q, C) learned embedding of the anchors.
            query_sine: (B, Q, C) modulated sine embedding of the anchor centres.
            memory_position: (B, S, C) position encoding of the memory.
            may_attend_queries, may_attend_memory: see `attend`.
        """
        query = self.sa_qcontent_proj(queries) + self.sa_qpos_proj(query_position)
        key = self.sa_kcontent_proj(queries) + self.sa_kpos_proj(query_position)
        attended = self.self_attn(query, key, self.sa_v_proj(queries), may_attend_queries)
        queries = self.norm1(queries + self.dropout1(attended))
        level_weights = self.lvl_attn(query).softmax(-1)
        found = self.attend_levels(queries, memory, query_position, query_sine, memory_position, may_attend_memory)
        # The weights add up to 1, so that one projection of the mixture equals the mixture of projections.
        attended = self.ca_out_v_proj((found * level_weights[..., None]).sum(-2))
        queries = self.norm2(queries + self.dropout2(attended))
        hidden = feed_forward(queries, self.linear1, self.activation, self.linear2, self.dropout)
        return self.norm3(queries + self.dropout3(hidden))

    def attend_levels(
        self,
        queries: Tensor,
        memory: TokenLevels,
        query_position: Tensor,
        query_sine: Tensor,
        memory_position: Tensor,
        may_attend: Tensor | None,
    ) -> Tensor:
        """Return what the queries find on each level, (B, Q, L, C).

        In every head content and sine embedding stand side by side, as in the decoder with one level.
        """
        query, key = self.ca_qcontent_proj(queries), self.ca_kcontent_proj(memory.tokens)
        key_position, value = self.ca_kpos_proj(memory_position), self.ca_v_proj(memory.tokens)
        if self.ca_qpos_proj is not None:
            query = query + self.ca_qpos_proj(query_position)
            key = key + key_position
        query = self._join_heads(query, self.ca_qpos_sine_proj(query_sine))
        key = self._join_heads(key, key_position)
        lengths = [height * width for height, width in memory.shapes]
        masks = [None] * len(lengths) if may_attend is None else may_attend.split(lengths, -1)
        parts = zip(key.split(lengths, 1), value.split(lengths, 1), masks, strict=True)
        dropout = self.attention_dropout if self.training else 0.0
        found = [attend(query, k, v, num_heads=self.num_heads, may_attend=m, dropout=dropout) for k, v, m in parts]
        return torch.stack(found, dim=-2)

    def _join_heads(self, content: Tensor, position: Tensor) -> Tensor:
        heads = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, position)]
        return torch.cat(heads, dim=-1).flatten(-2)


class MultiScaleDabTransformer(nn.Module):
    """Deformable encoder and DAB decoder of the encoder-only model (DN-DETR's repository).

    Kept for parity: every matrix starts from Xavier's distribution, those that predict sampling offsets and the pattern
    embeddings included, which the other deformable models leave at zero and normal.
    """

    def __init__(
        self,
        *,
        d_model: int = 256,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        activation: str = "prelu",
        num_levels: int = 4,
        encoder_points: int = 4,
        num_patterns: int = 0,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        encoder_layer = DeformableEncoderLayer(
            d_model=d_model,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=encoder_points,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            activation=activation,
        )
        decoder_layer = MultiScaleDabDecoderLayer(
            d_model=d_model,
            num_heads=num_heads,
            num_levels=num_levels,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            activation=activation,
        )
        self.level_embed = nn.Parameter(torch.empty(num_levels, d_model))
        self.encoder = DeformableEncoder(encoder_layer, num_layers=num_encoder_layers)
        self.decoder = DabDecoder(decoder_layer, num_layers=num_decoder_layers, d_model=d_model)
        self.patterns = nn.Embedding(num_patterns, d_model) if num_patterns else None
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.level_embed)

    def forward(
        self, levels: ProjectedLevels, queries: Tensor, anchors_unsigmoid: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode all levels and decode the queries.

        Args:
            levels: projected feature maps.
            queries: (B, Q, C) content and anchors_unsigmoid: (B, Q, 4), the denoising part first.
            attn_mask: (Q, Q) or (B, Q, Q), True = may not attend.

        Returns:
            hidden states (N, B, Q, C) and the anchors every layer started from (N, B, Q, 4).
        """
        memory = self.encoder(flatten_levels(levels), self.level_embed)
        return self.decoder(
            queries,
            anchors_unsigmoid,
            memory,
            memory_position=memory.position,
            padding_mask=memory.padding_mask,
            attn_mask=attn_mask,
        )

    def add_patterns(self, queries: Tensor) -> Tensor:
        """Repeat (Q, C) matching queries once per pattern and add the patterns: (patterns x Q, C), pattern-major."""
        if self.patterns is None:
            return queries
        return (self.patterns.weight[:, None] + queries).flatten(0, 1)
