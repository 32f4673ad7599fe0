"""DAB-Deformable-DETR: dynamic anchor boxes over multi-scale deformable attention (ICLR 2022)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import OptionError
from util.nested_tensor import NestedTensor, as_nested_tensor

from .. import build
from ..dn_components import DenoisingOptions, Targets
from ..layers.anchor_encoding import build_anchors
from ..layers.feature_projection import FeatureProjection
from ..registry import register_model
from ..transformers.deformable import DeformableTransformer
from ..transformers.deformable_encoder import TokenLevels
from .deformable_parts import (
    NUM_RESULTS,
    build_heads,
    classify_layers,
    deformable_criterion,
    deformable_transformer,
    freeze_untaught_heads,
    multi_scale_features,
)
from .denoising import DecoderQueries, matching_part, prepend_denoising, split_outputs


class DabDeformableDetr(nn.Module):
    """Multi-scale detector with anchor queries; with `label_embedding` the DN-DAB-Deformable-DETR and its DINO style.

    Args:
        backbone: gives feature maps and position encodings.
        projection: brings them to the transformer's width and adds coarser levels.
        transformer: encoder, decoder and, in a two-stage detector, the first stage.
        num_classes: K; num_queries: anchors, or proposals taken from the first stage.
        two_stage: queries start from encoder proposals instead of learned anchors.
        num_patterns: ask every learned anchor once per pattern; 0 for none.
        aux_loss: report predictions of earlier decoder layers.
        random_refpoints_xy: see `build_anchors`.
        label_embedding: queries end in an indicator channel, and classes have embeddings ("Label Embedding", DN-DETR).
        denoising: how to noise ground truth in training, None for no denoising; needs `label_embedding`.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projection: FeatureProjection,
        transformer: DeformableTransformer,
        num_classes: int,
        num_queries: int,
        two_stage: bool = False,
        num_patterns: int = 0,
        aux_loss: bool = True,
        random_refpoints_xy: bool = False,
        label_embedding: bool = False,
        denoising: DenoisingOptions | None = None,
    ) -> None:
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        num_heads = len(transformer.decoder.layers) + int(two_stage)
        self.class_embed, self.bbox_embed = build_heads(d_model, num_classes, num_heads, small_first=not two_stage)
        transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            transformer.decoder.class_embed = self.class_embed
        if not aux_loss:
            freeze_untaught_heads(transformer.decoder, self.class_embed, self.bbox_embed)
        self.label_enc = nn.Embedding(num_classes + 1, d_model - 1) if label_embedding else None
        if self.label_enc is not None and denoising is None:
            # Only denoising reads it here; without a gradient it must not be waited for by other processes.
            self.label_enc.requires_grad_(False)
        self.tgt_embed: nn.Embedding | None = None
        self.patterns_embed: nn.Embedding | None = None
        if not two_stage:
            self.tgt_embed = nn.Embedding(num_queries, d_model - int(label_embedding))
            self.refpoint_embed = build_anchors(num_queries, random_xy=random_refpoints_xy)
            if num_patterns:
                self.patterns_embed = nn.Embedding(num_patterns, d_model)
        self.input_proj = projection
        self.backbone = backbone
        self.num_queries, self.aux_loss, self.denoising = num_queries, aux_loss, denoising

    def forward(self, samples: NestedTensor | Sequence[Tensor], targets: Targets | None = None) -> dict[str, Any]:
        """Detect objects.

        Args:
            samples: a padded batch or a list of (3, H, W) normalised images.
            targets: ground truth, needed in training with denoising, unused otherwise.

        Returns:
            `pred_logits` (B, Q, K), `pred_boxes` (B, Q, 4) cxcywh in [0, 1], `aux_outputs`, `enc_outputs` with the
            proposals (B, S, ...) of a two-stage detector, and `dn_meta` in training with denoising.

        Raises:
            ValueError: training with denoising and no targets.
        """
        batch = as_nested_tensor(samples)
        features, positions = self.backbone(batch)
        levels = self.input_proj(features, positions, batch.mask, self.backbone.position_encoding)
        memory = self.transformer.encode(levels)
        queries, proposals = self.matching_queries(memory)
        if self.training and self.denoising is not None and self.label_enc is not None:
            queries = prepend_denoising(queries, targets, self.label_enc, self.denoising)
        decoded = self.transformer.decode(
            queries.content, queries.anchors_unsigmoid.sigmoid(), memory, self.bbox_embed, attn_mask=queries.attn_mask
        )
        logits, boxes = classify_layers(decoded, self.class_embed)
        return split_outputs(logits, boxes, queries.meta, aux_loss=self.aux_loss) | proposals

    def matching_queries(self, memory: TokenLevels) -> tuple[DecoderQueries, dict[str, Any]]:
        """Return the queries of the matching part and, from a first stage, `enc_outputs`."""
        if self.tgt_embed is None:
            proposals = self.transformer.propose(memory, self.num_queries)
            return DecoderQueries(proposals.content, proposals.anchors_unsigmoid), {"enc_outputs": proposals.outputs()}
        content = self.tgt_embed.weight
        if self.label_enc is not None:
            content = torch.cat((content, content.new_zeros((len(content), 1))), dim=1)  # indicator 0
        return matching_part(content, self.refpoint_embed.weight, self.patterns_embed, memory.tokens.shape[0]), {}


def build_dab_deformable_detr(
    args: Namespace,
    *,
    label_embedding: bool = False,
    denoising: DenoisingOptions | None = None,
    look_forward_twice: bool = False,
    mixed_query_selection: bool = False,
    num_results: int = NUM_RESULTS,
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build detector, criterion and postprocessors of the DAB-Deformable kind.

    Raises:
        OptionError: options of learned anchors together with `--two_stage`.
    """
    for name in ("num_patterns", "random_refpoints_xy"):
        if args.two_stage and getattr(args, name):
            raise OptionError(f"--{name} changes learned anchors, which --two_stage replaces: drop one of the two")
    backbone, projection = multi_scale_features(args)
    transformer = deformable_transformer(
        args,
        look_forward_twice=look_forward_twice,
        mixed_queries=args.num_queries if mixed_query_selection else 0,
    )
    model = DabDeformableDetr(
        backbone=backbone,
        projection=projection,
        transformer=transformer,
        num_classes=build.num_classes(args),
        num_queries=args.num_queries,
        two_stage=args.two_stage,
        num_patterns=args.num_patterns,
        aux_loss=args.aux_loss,
        random_refpoints_xy=args.random_refpoints_xy,
        label_embedding=label_embedding,
        denoising=denoising,
    )
    criterion = deformable_criterion(args, denoising=denoising is not None)
    return model, criterion, build.postprocessors(num_results)


@register_model("dab_deformable_detr")
def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build DAB-Deformable-DETR from options."""
    return build_dab_deformable_detr(args)
