"""A detector, a criterion and data small enough to train in milliseconds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

NUM_CLASSES = 3


class TinyDetector(nn.Module):
    """Three queries from the mean colour, with a dropout that draws random numbers in training."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 8)
        self.dropout = nn.Dropout(dropout)
        self.class_embed = nn.Linear(8, 3 * NUM_CLASSES)
        self.bbox_embed = nn.Linear(8, 12)

    def forward(self, samples: NestedTensor, targets: Any = None) -> dict[str, Tensor]:
        hidden = self.dropout(self.backbone(samples.tensors.mean((2, 3))).tanh())
        return {
            "pred_logits": self.class_embed(hidden).unflatten(1, (3, NUM_CLASSES)),
            "pred_boxes": self.bbox_embed(hidden).sigmoid().unflatten(1, (3, 4)),
        }


class TinyCriterion(nn.Module):
    """Query i answers object i; losses are sums over objects divided by their number."""

    weight_dict: ClassVar[dict[str, float]] = {"loss_ce": 2.0, "loss_bbox": 5.0}

    def forward(
        self, outputs: dict[str, Tensor], targets: Any, *, num_boxes: Tensor | None = None
    ) -> dict[str, Tensor]:
        count = sum(len(target["labels"]) for target in targets)
        divisor = max(count, 1) if num_boxes is None else num_boxes
        class_loss = outputs["pred_logits"].sum() * 0
        box_loss = outputs["pred_boxes"].sum() * 0
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
            for query, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                class_loss = class_loss - logits[query].log_softmax(0)[label]
                box_loss = box_loss + (boxes[query] - box).abs().sum()
        return {
            "loss_ce": class_loss / divisor,
            "loss_bbox": box_loss / divisor,
            "class_error": torch.tensor(50.0),
            "cardinality_error": torch.tensor(float(len(targets))),
        }


def tiny_postprocess(outputs: dict[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
    """Return every query with its best class, boxes xyxy in pixels."""
    results = []
    for logits, boxes, (height, width) in zip(
        outputs["pred_logits"], outputs["pred_boxes"], target_sizes.tolist(), strict=True
    ):
        scores, labels = logits.softmax(-1).max(-1)
        scale = torch.tensor([width, height, width, height])
        corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)
        results.append({"scores": scores, "labels": labels, "boxes": corners * scale})
    return results


class TinyData(torch.utils.data.Dataset[Any]):
    """Images of constant colour with one or two objects; image ids start at 100."""

    class_names: ClassVar[list[str]] = ["N/A", "cat", "dog"]

    def __init__(self, num_images: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.colors = torch.rand((num_images, 3), generator=generator)
        self.boxes = torch.rand((num_images, 2, 4), generator=generator) * 0.4 + 0.3

    def __len__(self) -> int:
        return len(self.colors)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        count = 1 + index % 2
        target = {
            "labels": torch.arange(1, count + 1),
            "boxes": self.boxes[index, :count],
            "image_id": torch.tensor([100 + index]),
            "orig_size": torch.tensor([20, 40]),
            "size": torch.tensor([4, 8]),
        }
        return self.colors[index][:, None, None].expand(3, 4, 8), target


class TinyLoader:
    """Batches in the order of the data; starts at `first_batch`, its length is that of the whole epoch."""

    def __init__(self, data: TinyData, batch_size: int = 2, first_batch: int = 0) -> None:
        self.data, self.batch_size, self.first_batch = data, batch_size, first_batch

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        for batch in range(self.first_batch, len(self)):
            samples = [self.data[batch * self.batch_size + i] for i in range(self.batch_size)]
            images, targets = zip(*samples, strict=True)
            yield nested_tensor_from_tensor_list(images), targets


class TinyEvaluator:
    """Remembers the detections; its twelve figures are 0.0, 0.1, ..."""

    def __init__(self) -> None:
        self.predictions: dict[int, dict[str, Tensor]] = {}
        self.coco_eval = {"bbox": argparse.Namespace(stats=[i / 10 for i in range(12)])}
        self.calls: list[str] = []

    def update(self, predictions: Any) -> None:
        assert not set(predictions) & set(self.predictions)
        self.predictions.update(predictions)

    def synchronize_between_processes(self) -> None:
        self.calls.append("synchronize")

    def accumulate(self) -> None:
        self.calls.append("accumulate")

    def summarize(self) -> None:
        self.calls.append("summarize")


def engine_args(**changes: Any) -> argparse.Namespace:
    """Return the options the engine reads."""
    values: dict[str, Any] = {
        "accumulate_steps": 1,
        "clip_max_norm": 0.1,
        "amp": False,
        "amp_dtype": None,
        "debug": False,
        "print_freq": 2,
        "output_dir": "",
        "save_results": False,
    }
    return argparse.Namespace(**{**values, **changes})
