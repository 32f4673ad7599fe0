"""The encoder-only deformable transformer: deformable encoder, dense DAB decoder over all levels of its memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.feature_projection import ProjectedLevels
from .dab_decoder import DabDecoder
from .dab_layer import DabLayer
from .deformable_encoder import DeformableEncoder, DeformableEncoderLayer, flatten_levels
from .layer_sizes import LayerSizes


class MultiScaleDabDecoderLayer(DabLayer):
    """A decoder layer that attends to every level by itself and mixes what it finds.

    The attention of one level competes only within that level; one softmax over levels, read from the query of the
    self-attention, weighs the results. The projections are shared by all levels.
    """

    def __init__(self, sizes: LayerSizes, *, num_levels: int) -> None:
        super().__init__(sizes)
        self.attention_dropout = sizes.dropout
        self.ca_out_v_proj = nn.Linear(sizes.d_model, sizes.d_model)
        nn.init.zeros_(self.ca_out_v_proj.bias)
        self.lvl_attn = nn.Linear(sizes.d_model, num_levels)
        self.add_feed_forward(sizes)

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
        """Attend level by level and add up by weight; arguments and result as of `DabLayer.gather`."""
        level_weights = self.lvl_attn(asked).softmax(-1)
        masks = [None] * len(level_lengths) if may_attend is None else may_attend.split(level_lengths, -1)
        parts = zip(key.split(level_lengths, 1), value.split(level_lengths, 1), masks, strict=True)
        dropout = self.attention_dropout if self.training else 0.0
        found = [attend(query, k, v, num_heads=self.num_heads, may_attend=m, dropout=dropout) for k, v, m in parts]
        # The weights add up to 1, so that one projection of the mixture equals the mixture of projections.
        return self.ca_out_v_proj((torch.stack(found, dim=-2) * level_weights[..., None]).sum(-2))


class MultiScaleDabTransformer(nn.Module):
    """Deformable encoder and DAB decoder of the encoder-only model (DN-DETR's repository).

    Kept for parity: every matrix starts from Xavier's distribution, those that predict sampling offsets and the pattern
    embeddings included, which the other deformable models leave at zero and normal.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        *,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        num_levels: int = 4,
        encoder_points: int = 4,
        num_patterns: int = 0,
    ) -> None:
        super().__init__()
        self.d_model = d_model = sizes.d_model
        encoder_layer = DeformableEncoderLayer(sizes, num_levels=num_levels, num_points=encoder_points)
        decoder_layer = MultiScaleDabDecoderLayer(sizes, num_levels=num_levels)
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
            memory.tokens,
            memory_position=memory.position,
            level_lengths=memory.lengths,
            padding_mask=memory.padding_mask,
            attn_mask=attn_mask,
        )
