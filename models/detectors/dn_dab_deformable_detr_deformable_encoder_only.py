"""DN-DAB-Deformable-DETR, encoder only: deformable attention in the encoder, the dense DAB decoder after it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.nested_tensor import NestedTensor, as_nested_tensor

from .. import build
from ..dn_components import DenoisingOptions, Targets
from ..layers.anchor_encoding import build_anchors
from ..layers.feature_projection import FeatureProjection
from ..layers.mlp import MLP
from ..layers.prediction_heads import build_class_head
from ..registry import register_model
from ..transformers.dab_decoder import refine_boxes
from ..transformers.multi_scale_dab import MultiScaleDabTransformer
from .deformable_parts import multi_scale_features
from .denoising import DecoderQueries, matching_part, prepend_denoising, split_outputs

CLASS_LOSS_WEIGHT = 1.0  # Kept for parity: --cls_loss_coef is not read here.


class EncoderOnlyDeformableDetr(nn.Module):
    """Multi-scale detector with the query side of DN-DAB-DETR.

    Args:
        backbone: gives feature maps and position encodings.
        projection: brings them to the transformer's width and adds coarser levels.
        transformer: encoder and decoder.
        num_classes: K; num_queries: anchors, each asked once per pattern.
        aux_loss: report predictions of earlier decoder layers.
        random_refpoints_xy: see `build_anchors`.
        denoising: how to noise ground truth in training, None for no denoising.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projection: FeatureProjection,
        transformer: MultiScaleDabTransformer,
        num_classes: int,
        num_queries: int,
        aux_loss: bool = True,
        random_refpoints_xy: bool = False,
        denoising: DenoisingOptions | None = None,
    ) -> None:
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        self.class_embed = build_class_head(d_model, num_classes)
        self.label_enc = nn.Embedding(num_classes + 1, d_model - 1)
        self.bbox_embed = MLP(d_model, d_model, 4, 3)  # Kept for parity: its last layer does not start at zero.
        transformer.decoder.bbox_embed = self.bbox_embed
        self.refpoint_embed = build_anchors(num_queries, random_xy=random_refpoints_xy)
        self.input_proj = projection
        for module in projection.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()  # Kept for parity: torch's own initial values instead of Xavier's.
        self.backbone = backbone
        self.aux_loss, self.denoising = aux_loss, denoising

    def forward(self, samples: NestedTensor | Sequence[Tensor], targets: Targets | None = None) -> dict[str, Any]:
        """Detect objects.

        Args:
            samples: a padded batch or a list of (3, H, W) normalised images.
            targets: ground truth, needed in training with denoising, unused otherwise.

        Returns:
            `pred_logits` (B, Q, K), `pred_boxes` (B, Q, 4) cxcywh in [0, 1], `aux_outputs`, and `dn_meta` in training
            with denoising.

        Raises:
            ValueError: training with denoising and no targets.
        """
        batch = as_nested_tensor(samples)
        features, positions = self.backbone(batch)
        levels = self.input_proj(features, positions, batch.mask, self.backbone.position_encoding)
        queries = self.matching_queries(batch.tensors.shape[0])
        if self.training and self.denoising is not None:
            queries = prepend_denoising(queries, targets, self.label_enc, self.denoising)
        hidden, references = self.transformer(levels, queries.content, queries.anchors_unsigmoid, queries.attn_mask)
        boxes = refine_boxes(self.bbox_embed(hidden), references)
        return split_outputs(self.class_embed(hidden), boxes, queries.meta, aux_loss=self.aux_loss)

    def matching_queries(self, batch_size: int) -> DecoderQueries:
        """Return the queries of the matching part."""
        anchors = self.refpoint_embed.weight
        no_object = torch.cat((self.label_enc.weight[-1], self.label_enc.weight.new_zeros(1)))  # indicator 0
        return matching_part(no_object.expand(len(anchors), -1), anchors, self.transformer.patterns, batch_size)


@register_model("dn_dab_deformable_detr_deformable_encoder_only")
def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build the encoder-only detector from options; without `--use_dn` it trains by matching alone."""
    backbone, projection = multi_scale_features(args, dense_position=True)
    transformer = MultiScaleDabTransformer(
        build.layer_sizes(args),  # the official default "prelu" is meant here, unlike in the other deformable models
        num_encoder_layers=args.enc_layers,
        num_decoder_layers=args.dec_layers,
        num_levels=args.num_feature_levels,
        encoder_points=args.enc_n_points,
        num_patterns=args.num_patterns,
    )
    # Negatives are told apart by how far their corners move, so contrastive pairs need noise on corners.
    box_noise = "corner" if args.contrastive else "center"
    denoising = build.denoising_from_args(args, box_noise=box_noise)
    model = EncoderOnlyDeformableDetr(
        backbone=backbone,
        projection=projection,
        transformer=transformer,
        num_classes=build.num_classes(args),
        num_queries=args.num_queries,
        aux_loss=args.aux_loss,
        random_refpoints_xy=args.random_refpoints_xy,
        denoising=denoising,
    )
    # Kept for parity: weights of the denoising losses are there without --use_dn too, where nothing bears their names.
    weights = build.loss_weights(args, denoising=True, class_weight=CLASS_LOSS_WEIGHT)
    criterion = build.criterion_from_args(args, weights=weights, denoising=denoising is not None)
    return model, criterion, build.postprocessors(args.num_select)
