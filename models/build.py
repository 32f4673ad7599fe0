"""Parts shared by all detectors, built from options: backbone, denoising, matcher, criterion, post-processing."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from util.box_ops import OVERLAP_EPS

from .backbones import Joiner, build_backbone
from .criterion import SetCriterion
from .dn_components import DenoisingOptions
from .layers.position_encoding import build_position_encoding
from .matcher import HungarianMatcher
from .postprocess import PostProcess
from .transformers.layer_sizes import LayerSizes

COCO_NUM_CLASSES = 91  # largest category id of COCO plus 1


def num_classes(args: Namespace) -> int:
    """Return K: `--num_classes` (the data set's own number, once it is read), or 91 for COCO.

    Raises:
        ValueError: another data set and no number.
    """
    if args.num_classes is not None:
        return args.num_classes
    if args.dataset_file != "coco":
        raise ValueError(f"the number of classes of data set '{args.dataset_file}' is unknown: pass --num_classes")
    return COCO_NUM_CLASSES


def backbone_from_args(args: Namespace, *, levels: int, dense_position: bool) -> Joiner:
    """Build backbone and position encoding.

    Args:
        args: options.
        levels: feature maps wanted from the backbone, 1 (last only) or 3.
        dense_position: DAB-style position encoding (own temperatures, no half-pixel shift) instead of the deformable
            one (10000, shifted).
    """
    kind = args.position_embedding
    temperatures = {"temperature_h": args.pe_temperatureH, "temperature_w": args.pe_temperatureW}
    if not dense_position:
        temperatures = {"temperature_h": 10000, "temperature_w": 10000}
    position = build_position_encoding(
        kind, hidden_dim=args.hidden_dim, half_pixel_shift=not dense_position, **temperatures
    )
    return build_backbone(
        name=args.backbone,
        position_encoding=position,
        weights=args.backbone_weights,
        train=args.lr_backbone > 0,
        norm=args.batch_norm_type,
        dilation=args.dilation,
        return_levels=levels,
        num_stages=args.backbone_stages,
        freeze_keywords=args.backbone_freeze_keywords or (),
    )


def layer_sizes(args: Namespace) -> LayerSizes:
    """Return the sizes of a transformer's layers."""
    return LayerSizes(
        d_model=args.hidden_dim,
        num_heads=args.nheads,
        dim_feedforward=args.dim_feedforward,
        dropout=args.dropout,
        activation=args.transformer_activation,
    )


def denoising_from_args(
    args: Namespace, *, box_noise: str = "center", budget: int | None = None
) -> DenoisingOptions | None:
    """Return the denoising options, None without `--use_dn`.

    Contrastive negatives are defined by their corners, so `--contrastive` brings the corner law along.

    Args:
        args: options.
        box_noise: law of the box noise, see `DenoisingOptions`.
        budget: query budget; default `--dn_number`.
    """
    if not args.use_dn:
        return None
    return DenoisingOptions(
        num_groups=args.scalar,
        query_budget=args.dn_number if budget is None else budget,
        label_noise_scale=args.label_noise_scale,
        box_noise_scale=args.box_noise_scale,
        box_noise="corner" if args.contrastive else box_noise,
        contrastive=args.contrastive,
        mask_padding=args.dn_mask_padding,
    )


def loss_weights(
    args: Namespace, *, denoising: bool, proposals: bool = False, class_weight: float | None = None
) -> dict[str, float]:
    """Return the weight of every loss that enters the total, official names.

    Args:
        args: options.
        denoising: add the `tgt_` losses.
        proposals: add the `_enc` losses of two-stage models.
        class_weight: replaces `--cls_loss_coef`.
    """
    base = {
        "loss_ce": args.cls_loss_coef if class_weight is None else class_weight,
        "loss_bbox": args.bbox_loss_coef,
        "loss_giou": args.giou_loss_coef,
    }
    if denoising:
        base |= {f"tgt_{name}": weight for name, weight in base.items()}
    weights = dict(base)
    if args.aux_loss:
        for layer in range(args.dec_layers - 1):
            weights |= {f"{name}_{layer}": weight for name, weight in base.items()}
    if proposals:
        weights |= {f"{name}_enc": weight for name, weight in base.items()}
    return weights


def criterion_from_args(
    args: Namespace,
    *,
    weights: dict[str, float],
    denoising: bool,
    matcher_alpha: float | None = None,
    box_parts: bool = True,
    overlap_eps: float = OVERLAP_EPS,
) -> SetCriterion:
    """Build matcher and criterion.

    Args:
        args: options.
        weights: from `loss_weights`.
        denoising: report denoising losses.
        matcher_alpha: focal alpha of the matching cost; default `--focal_alpha`.
        box_parts, overlap_eps: see `SetCriterion`.
    """
    matcher = HungarianMatcher(
        cost_class=args.set_cost_class,
        cost_bbox=args.set_cost_bbox,
        cost_giou=args.set_cost_giou,
        focal_alpha=args.focal_alpha if matcher_alpha is None else matcher_alpha,
        overlap_eps=overlap_eps,
    )
    return SetCriterion(
        matcher=matcher,
        weight_dict=weights,
        focal_alpha=args.focal_alpha,
        denoising=denoising,
        dn_normalizer=args.dn_normalizer,
        box_parts=box_parts,
        overlap_eps=overlap_eps,
    )


def postprocessors(num_select: int) -> dict[str, Any]:
    """Return the post-processors of a detector: "bbox", keeping `num_select` results per image."""
    return {"bbox": PostProcess(num_select)}
