"""Element-wise losses and logged figures shared by matching and denoising; everything in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from util.box_ops import OVERLAP_EPS, box_cxcywh_to_xyxy, elementwise_generalized_box_iou


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss element by element ("Focal Loss for Dense Object Detection", ICCV 2017).

    Args:
        logits: any shape, before the sigmoid.
        targets: 0 or 1, broadcast to the shape of logits.
        alpha: weight of targets 1 against 1 - alpha of targets 0; negative = no weighting.
        gamma: exponent that plays down easy examples.

    Returns:
        Losses of the shape of logits, not reduced.
    """
    logits = logits.float()
    targets = targets.to(logits.dtype).expand_as(logits)
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = probability + targets - 2 * probability * targets  # 1 - probability of the true answer
    loss = cross_entropy * miss**gamma
    return loss if alpha < 0 else loss * (targets * (2 * alpha - 1) + (1 - alpha))


def elementwise_box_losses(
    boxes_cxcywh: Tensor, target_cxcywh: Tensor, overlap_eps: float = OVERLAP_EPS
) -> tuple[Tensor, Tensor]:
    """Compare boxes with their targets one by one.

    Args:
        boxes_cxcywh, target_cxcywh: (..., 4) in [0, 1], broadcast against each other.
        overlap_eps: see `util.box_ops`.

    Returns:
        L1 distances (..., 4) and 1 - GIoU (...), float32.
    """
    boxes, target = boxes_cxcywh.float(), target_cxcywh.float()
    giou = elementwise_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target), overlap_eps)
    return (boxes - target).abs(), 1 - giou


@torch.no_grad()
def class_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of objects whose highest logit is not the true class.

    Args:
        logits: (..., N, K); labels: (N,) or (..., N) int64.

    Returns:
        (...) float32 in percent; 100 without any object, as official.
    """
    if logits.shape[-2] == 0:
        return logits.new_full(logits.shape[:-2], 100.0, dtype=torch.float32)
    return 100 - (logits.argmax(-1) == labels).float().mean(-1) * 100
