"""Deformable DETR (ICLR 2021): plain, with box refinement, and two-stage."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from util.errors import OptionError
from util.nested_tensor import NestedTensor, as_nested_tensor

from .. import build
from ..layers.feature_projection import FeatureProjection
from ..layers.prediction_heads import detection_outputs
from ..matcher import Targets
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

INVERSE_SIGMOID_EPS = 1e-5


class DeformableDetr(nn.Module):
    """Multi-scale detector with learned queries that look around a reference point.

    Args:
        backbone: gives feature maps and position encodings.
        projection: brings them to the transformer's width and adds coarser levels.
        transformer: encoder, decoder and, in a two-stage detector, the first stage.
        num_classes: K; num_queries: learned queries, or proposals taken from the first stage.
        box_refine: every decoder layer has its own heads and refines the boxes of the layer before.
        two_stage: queries start from encoder proposals; needs box_refine.
        aux_loss: report predictions of earlier decoder layers.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projection: FeatureProjection,
        transformer: DeformableTransformer,
        num_classes: int,
        num_queries: int,
        box_refine: bool = False,
        two_stage: bool = False,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        self.class_embed, self.bbox_embed = build_heads(
            d_model,
            num_classes,
            len(transformer.decoder.layers) + int(two_stage),
            shared=not box_refine,
            small_first=not two_stage,
        )
        if box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            transformer.decoder.class_embed = self.class_embed
        if box_refine and not aux_loss:
            freeze_untaught_heads(transformer.decoder, self.class_embed, self.bbox_embed)
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 2 * d_model)
        self.input_proj = projection
        self.backbone = backbone
        self.num_queries, self.aux_loss = num_queries, aux_loss

    def forward(self, samples: NestedTensor | Sequence[Tensor], targets: Targets | None = None) -> dict[str, Any]:
        """Detect objects.

        Args:
            samples: a padded batch or a list of (3, H, W) normalised images.
            targets: not used; there for one call of all detectors.

        Returns:
            `pred_logits` (B, Q, K), `pred_boxes` (B, Q, 4) cxcywh in [0, 1], `aux_outputs`, and `enc_outputs` with the
            proposals (B, S, ...) of a two-stage detector.
        """
        batch = as_nested_tensor(samples)
        features, positions = self.backbone(batch)
        levels = self.input_proj(features, positions, batch.mask, self.backbone.position_encoding)
        memory = self.transformer.encode(levels)
        content, position, references, proposals = self.start_queries(memory)
        decoded = self.transformer.decode(content, references, memory, self.bbox_embed, query_position=position)
        logits, boxes = classify_layers(decoded, self.class_embed)
        return detection_outputs(logits, boxes, aux_loss=self.aux_loss) | proposals

    def start_queries(self, memory: TokenLevels) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Any]]:
        """Return content and position (B, Q, C), references (B, Q, 2 or 4) in [0, 1] and `enc_outputs`, if any."""
        if self.query_embed is None:
            proposals = self.transformer.propose(memory, self.num_queries)
            references = proposals.anchors_unsigmoid.sigmoid()
            return proposals.content, proposals.position, references, {"enc_outputs": proposals.outputs()}
        queries = self.query_embed.weight.expand(memory.tokens.shape[0], -1, -1)
        position, content = queries.chunk(2, dim=-1)
        return content, position, self.transformer.references_of(position), {}


@register_model("deformable_detr")
def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build Deformable DETR from options.

    Raises:
        OptionError: `--two_stage` without `--with_box_refine`.
    """
    if args.two_stage and not args.with_box_refine:
        raise OptionError("--two_stage gives boxes that the decoder has to refine: pass --with_box_refine too")
    backbone, projection = multi_scale_features(args)
    transformer = deformable_transformer(args, anchor_queries=False, eps=INVERSE_SIGMOID_EPS)
    model = DeformableDetr(
        backbone=backbone,
        projection=projection,
        transformer=transformer,
        num_classes=build.num_classes(args),
        num_queries=args.num_queries,
        box_refine=args.with_box_refine,
        two_stage=args.two_stage,
        aux_loss=args.aux_loss,
    )
    criterion = deformable_criterion(args, denoising=False, overlap_eps=0.0)
    return model, criterion, build.postprocessors(NUM_RESULTS)
