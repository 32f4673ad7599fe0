"""Losses and logged figures shared by matching and denoising; everything in float32.

The focal loss and the box losses compute their gradients beside their values, from closed forms: training always wants
both, and a tenth of the operations is left of what automatic differentiation would launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from util.box_ops import OVERLAP_EPS


def focal_loss_sums(logits: Tensor, positives: Tensor, *, alpha: float = 0.25, counted: Tensor | None = None) -> Tensor:
    """Sum up the focal loss of every layer ("Focal Loss for Dense Object Detection", ICCV 2017, gamma 2).

    Almost every entry has the target 0. The sum is taken as if all had, and the few others are corrected: there is no
    tensor of targets.

    Args:
        logits: (N, ...), before the sigmoid.
        positives: (N, T) int64, where the target is 1, as positions in a flattened layer, none twice.
        alpha: weight of targets 1 against 1 - alpha of targets 0; negative = no weighting.
        counted: (T,) bool, False where a position is no positive after all; None: all are.

    Returns:
        (N,) float32.
    """
    weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    return _FocalSums.apply(logits.flatten(1).float(), positives, weights, counted)


class _FocalSums(torch.autograd.Function):
    """With p the probability and s = softplus(logit), a target 0 costs p^2 s and a target 1 (1 - p)^2 (s - logit).

    Two tensors are as large as the logits: p, and s, which turns into the loss and then into its slope.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, positives: Tensor, weights: tuple[float, float], counted: Tensor | None
    ) -> Tensor:
        of_positive, of_negative = weights
        p, s = logits.sigmoid(), F.softplus(logits)
        # The same for the positives alone.
        hit, soft = p.gather(1, positives), s.gather(1, positives)
        miss, other = 1 - hit, soft - logits.gather(1, positives)
        change = of_positive * miss.square() * other - of_negative * hit.square() * soft
        if counted is not None:
            change = change * counted
        loss = s.mul_(p).mul_(p)
        sums = loss.sum(1) * of_negative + change.sum(1)
        if ctx.needs_input_grad[0]:
            # d(p^2 s) = 2 ((1 - p) p^2 s + p^3 / 2); the 2 (1 - alpha) wait for the backward pass.
            slope = loss.addcmul_(loss, p, value=-1).add_(p.pow_(3), alpha=0.5)
            slope_hit = -of_positive * miss.square() * (2 * hit * other + miss)
            if counted is not None:
                slope_hit = torch.where(counted, slope_hit, 2 * of_negative * slope.gather(1, positives))
            ctx.save_for_backward(slope, slope_hit, positives)
            ctx.of_negative = of_negative
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, slope_hit, positives = ctx.saved_tensors
        scale = grads[0][:, None]
        grad = (slope * (scale * (2 * ctx.of_negative))).scatter_(1, positives, slope_hit * scale)
        return grad, None, None, None


def elementwise_box_losses(
    boxes_cxcywh: Tensor, target_cxcywh: Tensor, overlap_eps: float = OVERLAP_EPS
) -> tuple[Tensor, Tensor]:
    """Compare boxes with their targets one by one.

    Args:
        boxes_cxcywh: (..., 4) in [0, 1].
        target_cxcywh: of a shape that broadcasts to that of the boxes; gets no gradient.
        overlap_eps: see `util.box_ops`.

    Returns:
        L1 distances (..., 4) and 1 - GIoU (...), float32.
    """
    target = target_cxcywh.float().expand_as(boxes_cxcywh)
    distance, loss = _BoxLosses.apply(boxes_cxcywh.float(), target, overlap_eps)
    return distance, loss


class _BoxLosses(torch.autograd.Function):
    """The arithmetic of `util.box_ops.elementwise_generalized_box_iou`, and its derivative."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        difference = boxes - target
        corners = torch.stack((boxes, target))
        centre, half = corners[..., :2], corners[..., 2:] / 2
        (low, low_2), (high, high_2) = (centre - half).unbind(), (centre + half).unbind()
        size, size_2 = high - low, high_2 - low_2
        gap = torch.minimum(high, high_2) - torch.maximum(low, low_2)
        inner = gap.clamp(min=0)
        outer = torch.maximum(high, high_2) - torch.minimum(low, low_2)
        area, area_2, shared, hull = (torch.mul(*wh.unbind(-1)) for wh in (size, size_2, inner, outer))
        union = area + area_2 - shared
        iou, empty = shared / (union + eps), (hull - union) / (hull + eps)
        if ctx.needs_input_grad[0]:
            by_union = 1 / (hull + eps) - iou / (union + eps)
            by_shared = 1 / (union + eps) - by_union
            by_hull = (empty - 1) / (hull + eps)
            # Which of the two edges decides: 1 ours, 0 the target's, 1/2 both, as torch.minimum and maximum share it.
            ours_high = (high_2 - high).sign_().add_(1).div_(2)
            ours_low = (low - low_2).sign_().add_(1).div_(2)
            # A product of width and height changes with one of them as the other is large.
            of_shared = by_shared[..., None] * inner.flip(-1) * (gap >= 0)
            of_union = by_union[..., None] * size.flip(-1)
            of_hull = by_hull[..., None] * outer.flip(-1)
            to_high = of_shared * ours_high + of_union + of_hull * (1 - ours_high)
            to_low = of_shared * ours_low + of_union + of_hull * (1 - ours_low)  # with the sign turned round
            ctx.save_for_backward(difference.sign(), torch.cat((to_low - to_high, (to_high + to_low) / -2), -1))
        return difference.abs(), 1 - (iou - empty)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sign, slope = ctx.saved_tensors
        return torch.addcmul(grads[0] * sign, grads[1][..., None], slope), None, None


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
