"""Bipartite matching of queries and objects (DETR, ECCV 2020, "Object detection set prediction loss")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from util.box_ops import OVERLAP_EPS, box_cxcywh_to_xyxy, generalized_box_iou

Targets = Sequence[dict[str, Tensor]]


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

    @torch.no_grad()
    def match_layers(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets) -> Matches:
        """Match all layers of a batch with one copy to the host and one back.

        Args:
            logits: (N, B, Q, K); boxes_cxcywh: (N, B, Q, 4), N decoder layers; targets: B dicts.

        Returns:
            Matches on the device of the logits.
        """
        sizes = [len(t["labels"]) for t in targets]
        costs = self.cost(logits, boxes_cxcywh, targets, sizes)
        # Host synchronisation 1 of 1: the costs of all layers. The way back does not wait.
        blocks = torch.nan_to_num(costs, nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
        # A cost that is not a number is matched like a very bad one: the loss it leads to is not finite either,
        # and the training loop stops there with the names of the loss and the images.
        first = np.cumsum([0, *sizes[:-1]])
        pairs = [
            [linear_sum_assignment(blocks[layer, image, :, :n]) for image, n in enumerate(sizes)]
            for layer in range(len(blocks))
        ]
        query = np.stack([np.concatenate([q for q, _ in row]) for row in pairs])
        target = np.stack(
            [np.concatenate([t + start for (_, t), start in zip(row, first, strict=True)]) for row in pairs]
        )
        counts = [min(n, logits.shape[2]) for n in sizes]
        image = np.repeat(np.arange(len(sizes)), counts)
        packed = torch.from_numpy(np.concatenate((image[None], query, target)).astype(np.int64))
        packed = packed.to(logits.device, non_blocking=True)
        return Matches(packed[0], packed[1 : 1 + len(query)], packed[1 + len(query) :], counts)

    def cost(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, sizes: list[int]) -> Tensor:
        """Compute the cost blocks (N, B, Q, M) in float32; columns beyond an image's objects are meaningless."""
        labels, target_boxes = pad_targets(targets, sizes)
        boxes = boxes_cxcywh.float()
        wanted = labels[None, :, None, :].expand(*logits.shape[:3], -1)
        cost = self.cost_class * self._class_cost(logits.float().gather(-1, wanted))
        distance = torch.cdist(boxes, target_boxes[None].expand(len(boxes), -1, -1, -1), p=1)
        overlap = generalized_box_iou(
            box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes)[None], self.overlap_eps
        )
        return cost + self.cost_bbox * distance - self.cost_giou * overlap

    def _class_cost(self, logits: Tensor) -> Tensor:
        # Focal loss of "is this class" minus that of "is not", as official with gamma 2.
        probability = logits.sigmoid()
        positive = self.focal_alpha * (1 - probability) ** 2 * -(probability + 1e-8).log()
        negative = (1 - self.focal_alpha) * probability**2 * -(1 - probability + 1e-8).log()
        return positive - negative


def pad_targets(targets: Targets, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Stack the objects of a batch: labels (B, M), boxes (B, M, 4) float32 cxcywh, zeros where an image has fewer."""
    most = max(sizes, default=0)
    labels = torch.nn.utils.rnn.pad_sequence([t["labels"] for t in targets], batch_first=True)
    boxes = torch.nn.utils.rnn.pad_sequence([t["boxes"].float() for t in targets], batch_first=True)
    return labels[:, :most], boxes[:, :most]
