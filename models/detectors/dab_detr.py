"""DAB-DETR: dynamic anchor boxes as queries (ICLR 2022)."""

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
from ..layers.prediction_heads import build_box_head, build_class_head
from ..registry import register_model
from ..transformers.dab import DabTransformer
from ..transformers.dab_decoder import refine_boxes
from .denoising import DecoderQueries, matching_part, prepend_denoising, split_outputs


class DabDetr(nn.Module):
    """Detector on the last feature map; with `label_embedding` the DN-DAB-DETR.

    Args:
        backbone: gives feature maps and position encodings.
        transformer: encoder and decoder.
        num_classes: K; num_queries: anchors, each asked once per pattern.
        aux_loss: report predictions of earlier decoder layers.
        random_refpoints_xy: see `build_anchors`.
        label_embedding: queries carry class embeddings and an indicator instead of zeros ("Label Embedding", DN-DETR).
        denoising: how to noise ground truth in training, None for no denoising; needs `label_embedding`.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        transformer: DabTransformer,
        d_model: int,
        num_channels: int,
        num_classes: int,
        num_queries: int,
        aux_loss: bool = True,
        random_refpoints_xy: bool = False,
        label_embedding: bool = False,
        denoising: DenoisingOptions | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed = build_class_head(d_model, num_classes)
        self.label_enc = nn.Embedding(num_classes + 1, d_model - 1) if label_embedding else None
        self.bbox_embed = build_box_head(d_model)
        transformer.decoder.bbox_embed = self.bbox_embed
        self.refpoint_embed = build_anchors(num_queries, random_xy=random_refpoints_xy)
        self.input_proj = nn.Conv2d(num_channels, d_model, kernel_size=1)
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
        features, positions = self.backbone(as_nested_tensor(samples))
        feature_map = features[-1].tensors
        queries = self.matching_queries(feature_map.shape[0])
        if self.training and self.denoising is not None and self.label_enc is not None:
            queries = prepend_denoising(queries, targets, self.label_enc, self.denoising)
        hidden, references = self.transformer(
            self.input_proj(feature_map),
            features[-1].padding_mask,
            positions[-1],
            queries.content,
            queries.anchors_unsigmoid,
            queries.attn_mask,
        )
        boxes = refine_boxes(self.bbox_embed(hidden), references)
        return split_outputs(self.class_embed(hidden), boxes, queries.meta, aux_loss=self.aux_loss)

    def matching_queries(self, batch_size: int) -> DecoderQueries:
        """Return the queries of the matching part."""
        anchors = self.refpoint_embed.weight
        if self.label_enc is None:
            content = anchors.new_zeros((len(anchors), self.class_embed.in_features))
        else:
            no_object = torch.cat((self.label_enc.weight[-1], self.label_enc.weight.new_zeros(1)))  # indicator 0
            content = no_object.expand(len(anchors), -1)
        return matching_part(content, anchors, self.transformer.patterns, batch_size)


def build_dab_detr(args: Namespace, *, label_embedding: bool) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build detector, criterion and postprocessors of the DAB-DETR kind."""
    backbone = build.backbone_from_args(args, levels=1, dense_position=True)
    denoising = build.denoising_from_args(args) if label_embedding else None
    transformer = DabTransformer(
        build.layer_sizes(args),
        num_encoder_layers=args.enc_layers,
        num_decoder_layers=args.dec_layers,
        encoder_norm=args.pre_norm,
        num_patterns=args.num_patterns,
    )
    model = DabDetr(
        backbone=backbone,
        transformer=transformer,
        d_model=args.hidden_dim,
        num_channels=backbone.num_channels[-1],
        num_classes=build.num_classes(args),
        num_queries=args.num_queries,
        aux_loss=args.aux_loss,
        random_refpoints_xy=args.random_refpoints_xy,
        label_embedding=label_embedding,
        denoising=denoising,
    )
    weights = build.loss_weights(args, denoising=denoising is not None)
    criterion = build.criterion_from_args(args, weights=weights, denoising=denoising is not None)
    return model, criterion, build.postprocessors(args.num_select)


@register_model("dab_detr")
def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build DAB-DETR from options."""
    return build_dab_detr(args, label_embedding=False)
