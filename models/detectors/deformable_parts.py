"""What the deformable detectors share: multi-scale features, transformer, criterion, one pair of heads per layer."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from util.box_ops import OVERLAP_EPS

from .. import build
from ..backbones import Joiner
from ..criterion import SetCriterion
from ..layers.feature_projection import FeatureProjection
from ..layers.prediction_heads import build_box_head, build_class_head
from ..transformers.deformable import DeformableTransformer, deformable_activation
from ..transformers.deformable_decoder import Decoded, DeformableDecoder

# Kept for parity: the matchers of these models do not read --focal_alpha, their post-processing keeps 100 results.
MATCHER_ALPHA = 0.25
NUM_RESULTS = 100

BACKBONE_LEVELS = 3  # maps taken from the backbone where there are as many levels; the finest has stride 8
SMALL_BOX = -2.0  # first width and height before the sigmoid: about an eighth of the image


def multi_scale_features(args: Namespace, *, dense_position: bool = False) -> tuple[Joiner, FeatureProjection]:
    """Build backbone and projection for `--num_feature_levels` levels.

    The last maps of the backbone are used, at most three and none finer than stride 8; coarser levels are derived.

    Args:
        args: options.
        dense_position: see `build.backbone_from_args`.
    """
    levels = min(args.num_feature_levels, BACKBONE_LEVELS, max(1, args.backbone_stages - 1))
    backbone = build.backbone_from_args(args, levels=levels, dense_position=dense_position)
    return backbone, FeatureProjection(backbone.num_channels, args.hidden_dim, args.num_feature_levels)


def deformable_transformer(args: Namespace, **further: Any) -> DeformableTransformer:
    """Build the transformer with what every detector takes from options, and `further` arguments of its own."""
    return DeformableTransformer(
        build.layer_sizes(args)._replace(activation=deformable_activation(args.transformer_activation)),
        num_encoder_layers=args.enc_layers,
        num_decoder_layers=args.dec_layers,
        num_levels=args.num_feature_levels,
        encoder_points=args.enc_n_points,
        decoder_points=args.dec_n_points,
        two_stage=args.two_stage,
        **further,
    )


def deformable_criterion(args: Namespace, *, denoising: bool, overlap_eps: float = OVERLAP_EPS) -> SetCriterion:
    """Build matcher and criterion with the weights of all losses; arguments as of `build.criterion_from_args`."""
    return build.criterion_from_args(
        args,
        weights=build.loss_weights(args, denoising=denoising, proposals=True),
        denoising=denoising,
        matcher_alpha=MATCHER_ALPHA,
        box_parts=False,
        overlap_eps=overlap_eps,
    )


def build_heads(
    d_model: int, num_classes: int, num_heads: int, *, shared: bool = False, small_first: bool = True
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Return class heads and box heads, all starting alike, without offsets.

    Args:
        d_model: C; num_classes: K; num_heads: one per decoder layer, one more for two-stage proposals.
        shared: one head under all indices, as Deformable-DETR without refinement has it.
        small_first: boxes of the first layer start small; two-stage proposals bring their own size.
    """
    class_head, box_head = build_class_head(d_model, num_classes), build_box_head(d_model)
    class_heads, box_heads = [class_head] * num_heads, [box_head] * num_heads
    if not shared:
        class_heads, box_heads = [copy.deepcopy(h) for h in class_heads], [copy.deepcopy(h) for h in box_heads]
    if small_first:
        last = box_heads[0].layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias[2:], SMALL_BOX)
    return nn.ModuleList(class_heads), nn.ModuleList(box_heads)


def classify_layers(decoded: Decoded, class_embed: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """Apply every layer's class head.

    Args:
        decoded: what the N layers of the decoder found.
        class_embed: at least N heads; more belong to two-stage proposals.

    Returns:
        logits (N, B, Q, K) and boxes (N, B, Q, 4) cxcywh in [0, 1].
    """
    logits = [head(hidden) for head, hidden in zip(class_embed, decoded.hidden_states, strict=False)]
    return torch.stack(logits), torch.stack(decoded.boxes)


def freeze_untaught_heads(decoder: DeformableDecoder, class_embed: nn.ModuleList, bbox_embed: nn.ModuleList) -> None:
    """Freeze the heads that get no gradient when only the last decoder layer has losses (`--no_aux_loss`).

    Nothing would train them anyway, but several processes would wait for their gradients.
    """
    last = len(decoder.layers) - 1
    taught = 2 if decoder.look_forward_twice else 1  # box heads of the last layer, and of the one it looks back to
    for head in [*class_embed[:last], *bbox_embed[: max(0, last + 1 - taught)]]:
        head.requires_grad_(False)
