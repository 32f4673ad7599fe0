"""The deformable transformer: multi-scale encoder, two-stage proposals and decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.feature_projection import ProjectedLevels
from ..layers.ms_deform_attn import MSDeformAttn
from .deformable_decoder import AnchorDeformableDecoder, Decoded, DeformableDecoder, DeformableDecoderLayer
from .deformable_encoder import DeformableEncoder, DeformableEncoderLayer, TokenLevels, flatten_levels
from .layer_sizes import LayerSizes
from .two_stage import OBJECT_CLASS, Proposals, base_proposals, best_tokens, proposal_embedding, take_tokens

OFFICIAL_DEFAULT_ACTIVATION = "prelu"


def deformable_activation(name: str) -> str:
    """Return the activation of a deformable transformer.

    Kept for parity: the official default "prelu" is never read there and means relu; any other name is honoured.
    """
    return "relu" if name == OFFICIAL_DEFAULT_ACTIVATION else name


class DeformableTransformer(nn.Module):
    """Encoder, decoder and first stage of the deformable detectors (Deformable DETR, ICLR 2021; DAB-DETR, ICLR 2022).

    Args:
        sizes: of all layers; num_levels: L; encoder_points, decoder_points: P.
        anchor_queries: queries are anchor boxes that give their own positions (DAB), instead of learned positions.
        look_forward_twice: see `DeformableDecoder`.
        two_stage: queries start from encoder proposals; their content is a linear map of the proposals' boxes.
        mixed_queries: with two_stage, number of queries whose content is learned instead (DINO, ICLR 2023, "Mixed Query
            Selection"); 0 for none.
        eps: of the inverse sigmoid.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        *,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        num_levels: int = 4,
        encoder_points: int = 4,
        decoder_points: int = 4,
        anchor_queries: bool = True,
        look_forward_twice: bool = False,
        two_stage: bool = False,
        mixed_queries: int = 0,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        d_model = sizes.d_model
        self.d_model, self.eps = d_model, eps
        encoder_layer = DeformableEncoderLayer(sizes, num_levels=num_levels, num_points=encoder_points)
        decoder_layer = DeformableDecoderLayer(sizes, num_levels=num_levels, num_points=decoder_points)
        self.level_embed = nn.Parameter(torch.empty(num_levels, d_model))
        self.encoder = DeformableEncoder(encoder_layer, num_layers=num_encoder_layers)
        depth: dict[str, Any] = {"num_layers": num_decoder_layers, "look_forward_twice": look_forward_twice, "eps": eps}
        self.decoder = (
            AnchorDeformableDecoder(decoder_layer, d_model=d_model, **depth)
            if anchor_queries
            else DeformableDecoder(decoder_layer, **depth)
        )
        self.reference_points = None if anchor_queries or two_stage else nn.Linear(d_model, 2)
        self._add_first_stage(two_stage, mixed_queries)
        self.reset_parameters()

    def _add_first_stage(self, two_stage: bool, mixed_queries: int) -> None:
        self.tgt_embed: nn.Embedding | None = None
        if not two_stage:
            return
        self.enc_output = nn.Linear(self.d_model, self.d_model)
        self.enc_output_norm = nn.LayerNorm(self.d_model)
        if mixed_queries:
            self.tgt_embed = nn.Embedding(mixed_queries, self.d_model)
        else:
            self.pos_trans = nn.Linear(2 * self.d_model, 2 * self.d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * self.d_model)

    def reset_parameters(self) -> None:
        """Set the official initial values."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if self.reference_points is not None:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def encode(self, levels: ProjectedLevels) -> TokenLevels:
        """Return the memory: the tokens of all levels after the encoder."""
        return self.encoder(flatten_levels(levels), self.level_embed)

    def references_of(self, query_position: Tensor) -> Tensor:
        """Return the (B, Q, 2) points in [0, 1] that queries with learned positions (B, Q, C) start from."""
        assert self.reference_points is not None  # there are learned positions
        return self.reference_points(query_position).float().sigmoid()

    def propose(self, memory: TokenLevels, num_queries: int) -> Proposals:
        """Score every token and start queries from the best.

        Args:
            memory: from `encode`.
            num_queries: queries wanted; fewer come back when there are fewer tokens.

        Returns:
            Proposals.
        """
        class_embed, bbox_embed = self.decoder.class_embed, self.decoder.bbox_embed
        assert class_embed is not None and bbox_embed is not None  # a two-stage detector shares its heads
        base, unusable = base_proposals(memory)
        tokens = self.enc_output_norm(self.enc_output(memory.tokens.masked_fill(unusable[..., None], 0)))
        logits = class_embed[-1](tokens)
        boxes_unsigmoid = bbox_embed[-1](tokens).float() + base
        index = best_tokens(logits[..., OBJECT_CLASS].detach(), num_queries)
        anchors_unsigmoid = take_tokens(boxes_unsigmoid, index).detach()
        content, position = self.start_queries(anchors_unsigmoid)
        return Proposals(logits, boxes_unsigmoid.sigmoid(), anchors_unsigmoid, content, position)

    def start_queries(self, anchors_unsigmoid: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return content (B, Q, C) and position (B, Q, C) of queries that start from (B, Q, 4) proposals.

        There is no position where content is learned: the decoder then embeds its anchors.
        """
        batch_size, num_queries = anchors_unsigmoid.shape[:2]
        if self.tgt_embed is not None:
            return self.tgt_embed.weight[:num_queries].expand(batch_size, -1, -1), None
        embedding = proposal_embedding(anchors_unsigmoid, self.d_model // 2).to(self.pos_trans.weight.dtype)
        position, content = self.pos_trans_norm(self.pos_trans(embedding)).chunk(2, dim=-1)
        return content, position

    def decode(
        self,
        queries: Tensor,
        references: Tensor,
        memory: TokenLevels,
        box_heads: nn.ModuleList,
        *,
        query_position: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Decoded:
        """Run the decoder; arguments and results as of `DeformableDecoder`."""
        return self.decoder(queries, references, memory, box_heads, query_position=query_position, attn_mask=attn_mask)
