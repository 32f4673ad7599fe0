"""Bipartite matching of queries and objects (DETR, ECCV 2020, "Object detection set prediction loss")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from util.box_ops import OVERLAP_EPS, box_cxcywh_to_xyxy

Targets = Sequence[dict[str, Tensor]]
_Edge = Callable[..., Tensor]


class Matches(NamedTuple):
    """Matched pairs of all layers; every layer matches the same number T' of objects.

    Attributes:
        image: (T',) int64 image index; query: (N, T') int64 query index within the image;
        target: (N, T') int64 index into the objects of the whole batch, concatenated;
        counts: matched pairs per image.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    counts: list[int]


class Layers(NamedTuple):
    """Predictions to be matched.

    Attributes:
        logits: (N, B, Q, K); boxes_cxcywh: (N, B, Q, 4), N layers; targets: B dicts.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    targets: Targets

    @property
    def sizes(self) -> list[int]:
        """Objects of each image."""
        return [len(target["labels"]) for target in self.targets]


class HungarianMatcher:
    """Match queries to objects at the least total cost of class, L1 distance and GIoU.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the three costs.
        focal_alpha: alpha of the focal class cost; official: 0.25 always in the deformable and DINO-style models,
            `--focal_alpha` elsewhere.
        overlap_eps: see `util.box_ops`.

    Raises:
        ValueError: all weights are 0.
    """

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        focal_alpha: float = 0.25,
        overlap_eps: float = OVERLAP_EPS,
    ) -> None:
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("set_cost_class, set_cost_bbox and set_cost_giou are all 0: nothing to match by")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.focal_alpha, self.overlap_eps = focal_alpha, overlap_eps

    def __call__(self, outputs: dict[str, Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """Match one layer.

        Args:
            outputs: `pred_logits` (B, Q, K) and `pred_boxes` (B, Q, 4).
            targets: B dicts with `labels` (n,) and `boxes` (n, 4) cxcywh.

        Returns:
            Per image (query index, object index), min(Q, n) int64 each on the CPU, queries ascending.
        """
        matches = self.match_layers(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)
        sizes = [len(t["labels"]) for t in targets]
        first = np.cumsum([0, *sizes[:-1]])
        queries = matches.query[0].cpu().split(matches.counts)
        objects = matches.target[0].cpu().split(matches.counts)
        return [(q, t - int(start)) for q, t, start in zip(queries, objects, first, strict=True)]

    def match_layers(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets) -> Matches:
        """Match all layers of a batch; arguments and result as of `match_all`."""
        return self.match_all([Layers(logits, boxes_cxcywh, targets)])[0]

    @torch.no_grad()
    def match_all(self, sets: Sequence[Layers]) -> list[Matches]:
        """Match everything a training step has to match, with one copy to the host and one back.

        Args:
            sets: decoder layers, and the proposals of a two-stage detector.

        Returns:
            Matches of each set, on the device of the logits.
        """
        costs = [self.cost(each) for each in sets]
        # Host synchronisation 1 of 1: all costs. The way back does not wait.
        flat = torch.cat([cost.flatten() for cost in costs]) if len(costs) > 1 else costs[0].flatten()
        # A cost that is not a number is matched like a very bad one: the loss it leads to is not finite either,
        # and the training loop stops there with the names of the loss and the images.
        parts = torch.nan_to_num(flat, nan=1e6, posinf=1e6, neginf=-1e6).cpu().split([cost.numel() for cost in costs])
        assigned = [
            assign(part.view(cost.shape).numpy(), each.sizes)
            for part, cost, each in zip(parts, costs, sets, strict=True)
        ]
        packed = torch.from_numpy(np.concatenate([rows.ravel() for rows in assigned]))
        packed = packed.to(flat.device, non_blocking=True)
        return [
            unpack(rows.view(whole.shape), each)
            for rows, whole, each in zip(packed.split([rows.size for rows in assigned]), assigned, sets, strict=True)
        ]

    @torch.no_grad()
    def cost(self, layers: Layers) -> Tensor:
        """Compute the cost blocks (N, B, M, Q) in float32; rows beyond an image's objects are meaningless.

        Queries come last and coordinates apart, so that every operation runs along memory.
        """
        labels, target_boxes = pad_targets(layers.targets, layers.sizes)
        boxes = layers.boxes_cxcywh.float()
        own, given = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes)
        cost = overlap_of_planes(query_planes(own), object_planes(given), self.overlap_eps).mul_(-self.cost_giou)
        scratch = torch.empty_like(cost)
        for own, given in zip(query_planes(boxes), object_planes(target_boxes), strict=True):
            cost.add_(torch.sub(own, given, out=scratch).abs_(), alpha=self.cost_bbox)
        return cost.add_(self._class_cost(layers.logits.float(), labels))

    def _class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        # Focal loss of "is this class" minus that of "is not", as official with gamma 2.
        image = torch.arange(len(labels), device=labels.device)[:, None]
        probability = logits.transpose(2, 3)[:, image, labels].sigmoid_()
        rest = 1 - probability
        positive = (probability + 1e-8).log_().mul_(rest).mul_(rest).mul_(-self.cost_class * self.focal_alpha)
        negative = rest.add_(1e-8).log_().mul_(probability).mul_(probability)
        return positive.add_(negative, alpha=self.cost_class * (1 - self.focal_alpha))


def query_planes(boxes: Tensor) -> Tensor:
    """Lay coordinates of queries (N, B, Q, 4) out as (4, N, B, 1, Q), to be compared with `object_planes`."""
    return boxes.movedim(-1, 0).contiguous()[:, :, :, None]


def object_planes(boxes: Tensor) -> Tensor:
    """Lay coordinates of objects (B, M, 4) out as (4, B, M, 1), to be compared with `query_planes`."""
    return boxes.movedim(-1, 0).contiguous()[..., None]


def overlap_of_planes(own: Tensor, given: Tensor, eps: float) -> Tensor:
    """Generalised IoU of every pair, as `util.box_ops.generalized_box_iou`, in a third of its time and memory.

    Args:
        own: (4, N, B, 1, Q) and given: (4, B, M, 1) left, top, right, bottom.
        eps: added to both denominators.

    Returns:
        (N, B, M, Q).
    """

    (left, top, right, bottom), (left_2, top_2, right_2, bottom_2) = own.unbind(), given.unbind()
    # Written to again and again: new memory costs more than the arithmetic.
    shape = torch.broadcast_shapes(own.shape[1:], given.shape[1:])
    scratch, other = own.new_empty(shape), own.new_empty(shape)

    def product(first: _Edge, second: _Edge) -> Tensor:
        width = first(right, right_2).sub_(second(left, left_2, out=scratch)).clamp_(min=0)
        height = first(bottom, bottom_2, out=scratch).sub_(second(top, top_2, out=other)).clamp_(min=0)
        return width.mul_(height)

    shared, hull = product(torch.minimum, torch.maximum), product(torch.maximum, torch.minimum)
    own_area, given_area = (right - left) * (bottom - top), (right_2 - left_2) * (bottom_2 - top_2)
    union = torch.add(own_area, given_area, out=scratch).sub_(shared)
    empty = torch.sub(hull, union, out=other).div_(hull.add_(eps))
    return shared.div_(union.add_(eps)).sub_(empty)


def assign(blocks: np.ndarray[Any, Any], sizes: list[int]) -> np.ndarray[Any, Any]:
    """Solve the assignment of every layer and image on the host.

    Args:
        blocks: (N, B, M, Q) costs; sizes: objects of each image.

    Returns:
        (1 + 2 N, T') int64: images, then the queries of the layers, then their objects as in `Matches`.
    """
    first = np.cumsum([0, *sizes[:-1]])
    queries, objects = [], []
    for layer in blocks:
        pairs = [linear_sum_assignment(costs[:n]) for costs, n in zip(layer, sizes, strict=True)]
        orders = [np.argsort(query) for _, query in pairs]  # by query, as official
        queries.append(np.concatenate([query[order] for (_, query), order in zip(pairs, orders, strict=True)]))
        found = [found[order] for (found, _), order in zip(pairs, orders, strict=True)]
        objects.append(np.concatenate([own + start for own, start in zip(found, first, strict=True)]))
    image = np.repeat(np.arange(len(sizes)), [min(n, blocks.shape[3]) for n in sizes])
    return np.stack((image, *queries, *objects)).astype(np.int64)


def unpack(rows: Tensor, layers: Layers) -> Matches:
    """Lay the result of `assign` out as Matches."""
    depth = len(layers.logits)
    counts = [min(n, layers.logits.shape[2]) for n in layers.sizes]
    return Matches(rows[0], rows[1 : 1 + depth], rows[1 + depth :], counts)


def pad_targets(targets: Targets, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Stack the objects of a batch: labels (B, M), boxes (B, M, 4) float32 cxcywh, zeros where an image has fewer."""
    most = max(sizes, default=0)
    labels = torch.nn.utils.rnn.pad_sequence([t["labels"] for t in targets], batch_first=True)
    boxes = torch.nn.utils.rnn.pad_sequence([t["boxes"].float() for t in targets], batch_first=True)
    return labels[:, :most], boxes[:, :most]
