"""The DAB-DETR transformer: dense encoder and anchor decoder on one feature map."""

from __future__ import annotations

from torch import Tensor, nn

from .dab_decoder import DabDecoder, DabDecoderLayer
from .encoder import Encoder, EncoderLayer
from .layer_sizes import LayerSizes


class DabTransformer(nn.Module):
    """Encoder, decoder and pattern embeddings (DAB-DETR, ICLR 2022; Anchor DETR, AAAI 2022, "Multiple predictions")."""

    def __init__(
        self,
        sizes: LayerSizes,
        *,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        encoder_norm: bool = False,
        num_patterns: int = 0,
    ) -> None:
        super().__init__()
        d_model = sizes.d_model
        self.encoder = Encoder(
            EncoderLayer(sizes), num_layers=num_encoder_layers, d_model=d_model, final_norm=encoder_norm
        )
        self.decoder = DabDecoder(DabDecoderLayer(sizes), num_layers=num_decoder_layers, d_model=d_model)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # After the loop above: patterns keep the normal initialisation of an embedding.
        self.patterns = nn.Embedding(num_patterns, d_model) if num_patterns else None

    def forward(
        self,
        feature_map: Tensor,
        padding_mask: Tensor | None,
        position: Tensor,
        queries: Tensor,
        anchors_unsigmoid: Tensor,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode a feature map and decode the queries.

        Args:
            feature_map: (B, C, H, W); position: (B, C, H, W).
            padding_mask: (B, H, W), True = padding; None: no padding.
            queries: (B, Q, C) content and anchors_unsigmoid: (B, Q, 4), the denoising part first.
            attn_mask: (Q, Q) or (B, Q, Q), True = may not attend.

        Returns:
            hidden states (N, B, Q, C) and the anchors every layer started from (N, B, Q, 4).
        """
        tokens = feature_map.flatten(2).transpose(1, 2)
        position = position.flatten(2).transpose(1, 2)
        mask = None if padding_mask is None else padding_mask.flatten(1)
        memory = self.encoder(tokens, position, mask)
        return self.decoder(
            queries,
            anchors_unsigmoid,
            memory,
            memory_position=position,
            level_lengths=[memory.shape[1]],
            padding_mask=mask,
            attn_mask=attn_mask,
        )
