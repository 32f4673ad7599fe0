"""The classic way to match and to compute losses, layer by layer: the baseline `SetCriterion` is measured against.

Written from the definitions (DETR, ECCV 2020, "Object detection set prediction loss"; focal loss as in Deformable DETR;
denoising losses as in DN-DETR): for every decoder layer the cost of all queries of the batch against all objects of
the batch, one copy to the host and one assignment per image, then losses with a full one-hot tensor and with the
diagonal of the GIoU of all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from models.dn_components import DenoisingOutputs
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

Targets = Sequence[dict[str, Tensor]]
Matches = list[tuple[Tensor, Tensor]]  # (query, object) indices per image


class ClassicCriterion(nn.Module):
    """The losses of `SetCriterion` under the same names, one layer after the other.

    Args:
        weight_dict: weight of every loss in the total.
        costs: weights of class, L1 distance and GIoU in the matching.
        alpha: of the focal loss and of its cost.
        box_parts: log `loss_xy` and `loss_hw`.
    """

    def __init__(
        self,
        *,
        weight_dict: dict[str, float],
        costs: tuple[float, float, float] = (2.0, 5.0, 2.0),
        alpha: float = 0.25,
        box_parts: bool = True,
    ) -> None:
        super().__init__()
        self.weight_dict, self.costs, self.alpha, self.box_parts = weight_dict, costs, alpha, box_parts

    def forward(self, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Return every loss by official name; arguments as of `SetCriterion`."""
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            return self.all_layers(outputs, targets)

    def all_layers(self, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Go through the layers, last layer first."""
        num_boxes = max(torch.tensor(float(sum(len(t["labels"]) for t in targets))).item(), 1.0)
        losses = self.layer(outputs, targets, num_boxes, is_last=True)
        for index, earlier in enumerate(outputs.get("aux_outputs", ())):
            own = self.layer(earlier, targets, num_boxes, is_last=False)
            losses |= {f"{name}_{index}": value for name, value in own.items()}
        if "enc_outputs" in outputs:
            agnostic = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            own = self.layer(outputs["enc_outputs"], agnostic, num_boxes, is_last=False)
            losses |= {f"{name}_enc": value for name, value in own.items()}
        if "dn_meta" in outputs:
            losses |= self.denoising(outputs["dn_meta"])
        return losses

    def layer(
        self, outputs: dict[str, Tensor], targets: Targets, num_boxes: float, *, is_last: bool
    ) -> dict[str, Tensor]:
        """Match one layer and return its losses."""
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        matches = self.match(logits, boxes, targets)
        image = torch.cat([torch.full_like(query, number) for number, (query, _) in enumerate(matches)])
        where = (image, torch.cat([query for query, _ in matches]))
        labels = torch.cat([t["labels"][found] for t, (_, found) in zip(targets, matches, strict=True)])
        wanted = torch.cat([t["boxes"][found] for t, (_, found) in zip(targets, matches, strict=True)])
        classes = torch.full(logits.shape[:2], logits.shape[2], dtype=torch.int64, device=logits.device)
        classes[where] = labels
        losses = {"loss_ce": self.focal(logits, classes).mean(1).sum() / num_boxes * logits.shape[1]}
        losses |= box_losses(boxes[where], wanted, num_boxes)
        with torch.no_grad():
            if self.box_parts:
                distance = (boxes[where] - wanted).abs()
                losses["loss_xy"] = distance[:, :2].sum() / num_boxes
                losses["loss_hw"] = distance[:, 2:].sum() / num_boxes
            counts = torch.tensor([float(len(t["labels"])) for t in targets], device=logits.device)
            found_counts = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
            losses["cardinality_error"] = F.l1_loss(found_counts.float(), counts)
            if is_last:
                losses["class_error"] = 100 - (logits[where].argmax(-1) == labels).float().mean() * 100
        return losses

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Matches:
        """Assign queries to objects: costs of all queries and all objects of the batch, split by image on the host."""
        probability = logits.flatten(0, 1).sigmoid()
        labels = torch.cat([t["labels"] for t in targets])
        wanted = torch.cat([t["boxes"] for t in targets])
        negative = (1 - self.alpha) * probability**2 * -(1 - probability + 1e-8).log()
        positive = self.alpha * (1 - probability) ** 2 * -(probability + 1e-8).log()
        class_cost = positive[:, labels] - negative[:, labels]
        distance = torch.cdist(boxes.flatten(0, 1), wanted, p=1)
        overlap = generalized_box_iou(box_cxcywh_to_xyxy(boxes.flatten(0, 1)), box_cxcywh_to_xyxy(wanted))
        cost = self.costs[0] * class_cost + self.costs[1] * distance - self.costs[2] * overlap
        parts = cost.view(*logits.shape[:2], -1).cpu().split([len(t["labels"]) for t in targets], -1)
        pairs = [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]
        return [(torch.as_tensor(query), torch.as_tensor(found)) for query, found in pairs]

    def focal(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Focal loss (..., Q, K) against classes (..., Q), K for none."""
        one_hot = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
        probability = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        right = probability * one_hot + (1 - probability) * (1 - one_hot)
        return (self.alpha * one_hot + (1 - self.alpha) * (1 - one_hot)) * entropy * (1 - right) ** 2

    def denoising(self, outputs: DenoisingOutputs) -> dict[str, Tensor]:
        """Return the reconstruction losses, one layer after the other."""
        meta, losses = outputs.meta, {}
        known = max(meta.num_positive, 1)
        for index, (all_logits, all_boxes) in enumerate(zip(outputs.logits, outputs.boxes_cxcywh, strict=True)):
            suffix = "" if index == len(outputs.logits) - 1 else f"_{index}"
            logits = all_logits[meta.image_index, meta.slot_index].float()
            boxes = all_boxes[meta.image_index, meta.slot_index].float()
            losses[f"tgt_loss_ce{suffix}"] = self.focal(logits, meta.labels).sum() / known
            own = box_losses(boxes, meta.boxes_cxcywh, known)
            losses |= {f"tgt_{name}{suffix}": value for name, value in own.items()}
            with torch.no_grad():
                share = (logits.argmax(-1) == meta.labels).float().mean()
                losses[f"tgt_class_error{suffix}"] = 100 - share * 100
        return losses


def box_losses(boxes: Tensor, wanted: Tensor, num_boxes: float) -> dict[str, Tensor]:
    """Return the L1 loss and one minus the diagonal of the GIoU of all pairs."""
    overlap = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(wanted)).diag()
    return {
        "loss_bbox": F.l1_loss(boxes, wanted, reduction="none").sum() / num_boxes,
        "loss_giou": (1 - overlap).sum() / num_boxes,
    }
