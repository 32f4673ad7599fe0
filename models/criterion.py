"""Set prediction loss of all models: match, then class, box and denoising losses over all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.box_ops import OVERLAP_EPS
from util.distributed import mean_over_ranks

from .dn_components import DenoisingOutputs, compute_dn_loss, name_layers
from .losses import class_error, elementwise_box_losses, focal_loss_sums
from .matcher import HungarianMatcher, Layers, Matches

Targets = Sequence[dict[str, Tensor]]

DN_LOSSES = ("tgt_loss_ce", "tgt_class_error", "tgt_loss_bbox", "tgt_loss_giou")


class SetCriterion(nn.Module):
    """Losses of a DETR-like detector (DETR, ECCV 2020; focal loss as in Deformable DETR, ICLR 2021).

    Args:
        matcher: pairs queries with objects.
        weight_dict: weight of every loss that enters the total; other entries are only logged.
        focal_alpha: alpha of the classification loss.
        denoising: report denoising losses, zeros where there is no denoising part.
        dn_normalizer: "local" divides denoising losses by this process's known objects (official), "global" by the
            mean over processes, so that two processes equal one.
        box_parts: log `loss_xy` and `loss_hw` as the DAB repositories do.
        overlap_eps: see `util.box_ops`.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        focal_alpha: float = 0.25,
        denoising: bool = False,
        dn_normalizer: str = "local",
        box_parts: bool = True,
        overlap_eps: float = OVERLAP_EPS,
    ) -> None:
        super().__init__()
        self.matcher, self.weight_dict, self.focal_alpha = matcher, weight_dict, focal_alpha
        self.denoising, self.dn_normalizer = denoising, dn_normalizer
        self.box_parts, self.overlap_eps = box_parts, overlap_eps

    def forward(
        self,
        outputs: dict[str, Any],
        targets: Targets,
        *,
        num_boxes: Tensor | None = None,
        num_known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute every loss.

        Args:
            outputs: what a detector returns.
            targets: B dicts with `labels` (n,) int64 and `boxes` (n, 4) cxcywh in [0, 1].
            num_boxes: normaliser of the matching losses; by default the mean number of objects per process.
            num_known: normaliser of the denoising losses; by default as `dn_normalizer` says.

        Returns:
            0-d float32 tensors by official name, weighted by nothing yet.
        """
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            if num_boxes is None:
                num_boxes = mean_count(sum(len(t["labels"]) for t in targets), outputs["pred_logits"].device)
            layers = [*outputs.get("aux_outputs", ()), outputs]
            logits = torch.stack([layer["pred_logits"] for layer in layers])
            boxes = torch.stack([layer["pred_boxes"] for layer in layers])
            sets = [Layers(logits, boxes, targets)]
            if "enc_outputs" in outputs:
                sets.append(proposals_as_layer(outputs["enc_outputs"], targets))
            matches = self.matcher.match_all(sets)
            losses = self.matching_losses(sets[0], matches[0], num_boxes)
            if "enc_outputs" in outputs:
                proposals = self.layer_losses(sets[1], matches[1], num_boxes)
                losses |= {f"{name}_enc": value[0] for name, value in proposals.items()}
            if self.denoising:
                losses |= self.denoising_losses(outputs.get("dn_meta"), losses, num_known)
        return losses

    def matching_losses(self, layers: Layers, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
        """Losses of N decoder layers, last layer last, given their matches."""
        named = name_layers(self.layer_losses(layers, matches, num_boxes), len(layers.logits))
        labels = torch.cat([t["labels"] for t in layers.targets])[matches.target[-1]]
        named["class_error"] = class_error(layers.logits[-1, matches.image, matches.query[-1]].detach(), labels)
        return named

    def layer_losses(self, layers: Layers, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
        """Return (N,) losses of N layers given their matches."""
        logits, boxes, targets = layers
        labels = torch.cat([t["labels"] for t in targets])[matches.target]
        wanted = torch.cat([t["boxes"] for t in targets]).float()[matches.target]
        query = matches.image * logits.shape[2] + matches.query  # in the batch, (N, T')
        found = boxes.flatten(1, 2).gather(1, query[..., None].expand(-1, -1, 4))
        focal = focal_loss_sums(logits, query * logits.shape[3] + labels, alpha=self.focal_alpha)
        l1, giou = elementwise_box_losses(found, wanted, self.overlap_eps)
        sums = torch.stack((focal, l1.sum((1, 2)), giou.sum(1))) / num_boxes
        losses = dict(zip(("loss_ce", "loss_bbox", "loss_giou"), sums.unbind(), strict=True))
        with torch.no_grad():
            if self.box_parts:
                parts = l1.unflatten(-1, (2, 2)).sum((1, 3)) / num_boxes
                losses["loss_xy"], losses["loss_hw"] = parts.unbind(-1)
            losses["cardinality_error"] = cardinality_error(logits, layers.sizes)
        return losses

    def denoising_losses(
        self, outputs: DenoisingOutputs | None, losses: dict[str, Tensor], num_known: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses of the denoising part, zeros in evaluation where there is none."""
        if outputs is None:
            suffixes = [name.removeprefix("loss_ce") for name in losses if name.startswith("loss_ce")]
            zero = losses["loss_ce"].detach() * 0
            return {name + suffix: zero for suffix in suffixes if suffix != "_enc" for name in DN_LOSSES}
        if num_known is None and self.dn_normalizer == "global":
            num_known = mean_count(outputs.meta.num_positive, outputs.logits.device)
        return compute_dn_loss(outputs, focal_alpha=self.focal_alpha, num_known=num_known)


def proposals_as_layer(proposals: dict[str, Any], targets: Targets) -> Layers:
    """Lay two-stage proposals out as one layer.

    All objects count as class 0 when the proposals carry `class_agnostic` (Deformable DETR, "Two-Stage").
    """
    if proposals.get("class_agnostic", False):
        targets = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
    return Layers(proposals["pred_logits"][None], proposals["pred_boxes"][None], targets)


@torch.no_grad()
def cardinality_error(logits: Tensor, counts: list[int]) -> Tensor:
    """Return the (N,) mean distance between predicted and true object counts, logged only.

    Kept for parity: a query counts as an object unless its highest logit is the last class, which is what the
    official code measures although no class means "no object" with the focal loss.

    Args:
        logits: (N, B, Q, K); counts: objects of each image.
    """
    # The last class is the highest where it beats all before it; a maximum is faster than its index.
    others = logits[..., :-1].amax(-1) if logits.shape[-1] > 1 else logits.new_full(logits.shape[:-1], -torch.inf)
    predicted = (others >= logits[..., -1]).sum(-1).float()
    true = torch.tensor(counts, dtype=torch.float32).to(logits.device, non_blocking=True)
    return (predicted - true).abs().mean(-1)


@torch.no_grad()
def mean_count(count: int, device: torch.device) -> Tensor:
    """Return the mean of a count over processes, at least 1, as a 0-d float32 tensor on the device."""
    return mean_over_ranks(torch.tensor(float(count)).to(device, non_blocking=True)).clamp(min=1)
