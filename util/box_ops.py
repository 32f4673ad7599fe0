"""Box arithmetic: formats, overlaps (all pairs and element by element) and the inverse sigmoid.

A box in ``cxcywh`` is centre and size, in ``xyxy`` the two corners. Overlaps take any unit; every result is
float32 or wider, because half precision cannot tell neighbouring boxes apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

# DN-DETR and DAB-DETR add this to both denominators; Deformable-DETR adds nothing and gets nan for an empty pair.
OVERLAP_EPS = 1e-6


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Turn (..., 4) centre-size boxes into corner boxes."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Turn (..., 4) corner boxes into centre-size boxes."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Area of (..., 4) corner boxes, (...)."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def elementwise_box_iou(a_xyxy: Tensor, b_xyxy: Tensor, eps: float = OVERLAP_EPS) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes that broadcast against each other.

    Args:
        a_xyxy, b_xyxy: (..., 4) corner boxes.
        eps: added to the union in the denominator; 0 gives nan for two empty boxes, as Deformable-DETR does.

    Returns:
        (iou, union), each of the broadcast shape without the last axis.
    """
    a_xyxy, b_xyxy = _at_least_float32(a_xyxy), _at_least_float32(b_xyxy)
    low = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    intersection = _product(high - low)
    union = box_area(a_xyxy) + box_area(b_xyxy) - intersection
    return intersection / (union + eps), union


def elementwise_generalized_box_iou(a_xyxy: Tensor, b_xyxy: Tensor, eps: float = OVERLAP_EPS) -> Tensor:
    """Generalised IoU ("Generalized Intersection over Union", CVPR 2019) of boxes that broadcast against each other.

    Args:
        a_xyxy, b_xyxy: (..., 4) corner boxes.
        eps: added to both denominators.

    Returns:
        GIoU in [-1, 1], of the broadcast shape without the last axis.
    """
    a_xyxy, b_xyxy = _at_least_float32(a_xyxy), _at_least_float32(b_xyxy)
    iou, union = elementwise_box_iou(a_xyxy, b_xyxy, eps)
    low = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    hull = _product(high - low)
    return iou - (hull - union) / (hull + eps)


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor, eps: float = OVERLAP_EPS) -> tuple[Tensor, Tensor]:
    """IoU of every pair: (..., N, 4) and (..., M, 4) corner boxes -> (iou, union), each (..., N, M)."""
    return elementwise_box_iou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :], eps)


def generalized_box_iou(a_xyxy: Tensor, b_xyxy: Tensor, eps: float = OVERLAP_EPS) -> Tensor:
    """Generalised IoU of every pair: (..., N, 4) and (..., M, 4) corner boxes -> (..., N, M)."""
    return elementwise_generalized_box_iou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :], eps)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of probabilities clamped away from 0 and 1.

    Args:
        x: any shape, clamped to [0, 1].
        eps: lower bound of x and of 1 - x; 1e-3 in DN-DETR and DAB-DETR, 1e-5 in Deformable-DETR.

    Returns:
        log(x / (1 - x)), same shape.
    """
    # Bounds of one type: an integer beside a float ties exported models to one batch size.
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def _product(wh: Tensor) -> Tensor:
    # Not Tensor.prod: its backward looks for zeros on the host.
    width, height = wh.clamp(min=0).unbind(-1)
    return width * height


def _at_least_float32(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()
