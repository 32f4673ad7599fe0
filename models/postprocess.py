"""From raw predictions to detections in pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from util.box_ops import box_cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Keep the best (query, class) pairs of every image.

    Args:
        num_select: pairs kept; official: `--num_select` in DAB-style models, `--num_results` in the DINO-style one,
            always 100 in the deformable ones. Fewer when there are fewer pairs.
    """

    def __init__(self, num_select: int = 300) -> None:
        super().__init__()
        self.num_select = num_select

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Select and scale.

        Args:
            outputs: `pred_logits` (B, Q, K) and `pred_boxes` (B, Q, 4) cxcywh in [0, 1].
            target_sizes: (B, 2) height and width in pixels of the images the boxes shall refer to.

        Returns:
            Per image `scores` (n,) in [0, 1] descending, `labels` (n,) int64, `boxes` (n, 4) xyxy in pixels.

        Raises:
            ValueError: target_sizes does not fit the batch.
        """
        scores, labels, corners = self.select(outputs, target_sizes)
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, corners, strict=True)]

    def select(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same for the whole batch at once.

        Args:
            outputs, target_sizes: as `forward`.

        Returns:
            scores (B, n), labels (B, n) and boxes (B, n, 4).

        Raises:
            ValueError: target_sizes does not fit the batch.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if target_sizes.shape != (logits.shape[0], 2):
            raise ValueError(f"expected target_sizes of shape {(len(logits), 2)}, got {tuple(target_sizes.shape)}")
        num_classes = logits.shape[-1]
        probability = logits.sigmoid().flatten(1)
        scores, pair = probability.topk(min(self.num_select, probability.shape[1]), dim=1)
        query = torch.div(pair, num_classes, rounding_mode="floor")
        corners = box_cxcywh_to_xyxy(boxes).gather(1, query[..., None].expand(-1, -1, 4))
        height, width = target_sizes.to(corners).unbind(1)
        corners = corners * torch.stack((width, height, width, height), dim=1)[:, None]
        return scores, pair % num_classes, corners
