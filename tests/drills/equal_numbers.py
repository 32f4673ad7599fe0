"""Train a small DN-DAB-DETR for fifty AdamW steps, alone or as one of several processes, and save its parameters.

    python -m tests.drills.equal_numbers OUTPUT.pth TOTAL_BATCH [OPTIONS OF main.py ...]

Pictures have one size, so that a batch is padded the same way however it is split. The noise of a known object is a
function of its box, so that it does not depend on which process draws it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import main
from datasets import TrainBatchSampler, collate_fn
from engine import train_one_epoch
from models import build_model
from util.distributed import (
    destroy_process_group,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    wrap_model,
)
from util.optim import build_optimizer, parameter_groups

STEPS = 50
NUM_CLASSES = 4
SIZES = "--enc_layers 1 --dec_layers 2 --dim_feedforward 64 --num_queries 12 --num_classes 4 --backbone resnet18"
PLACE = "--backbone_weights none --backbone_stages 2 --device cpu --dist_timeout 1"


class FixedPictures:
    """Random pictures of one size. In every fifth batch all those of the second of two processes are without objects.

    The total of a batch is never below two objects: the official normaliser counts at least one per process.
    """

    def __init__(self, count: int, total_batch: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.pictures = torch.randn((count, 3, 32, 32), generator=generator)
        self.boxes = torch.rand((count, 3, 4), generator=generator) * 0.3 + 0.35
        self.labels = torch.randint(0, NUM_CLASSES, (count, 3), generator=generator)
        # The sampler's order for seed 0 and epoch 0.
        place = torch.randperm(count, generator=torch.Generator().manual_seed(0)).argsort()
        is_empty = (place // total_batch % 5 == 0) & (place % 2 == 1)
        self.objects = torch.where(is_empty, 0, 1 + place % 3).tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        objects = self.objects[index]
        target = {
            "labels": self.labels[index, :objects],
            "boxes": self.boxes[index, :objects],
            "image_id": torch.tensor([index]),
        }
        return self.pictures[index], target


class Batches:
    """Batches of a sampler over fixed pictures."""

    def __init__(self, pictures: FixedPictures, sampler: TrainBatchSampler) -> None:
        self.pictures, self.sampler = pictures, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for indices in self.sampler:
            yield collate_fn([self.pictures[index] for index in indices])


def noise_from_boxes(labels: Tensor, boxes: Tensor, num_classes: int, **scales: object) -> tuple[Tensor, Tensor]:
    """Shift boxes by sines of themselves and turn the label of some."""
    moved = (boxes + 0.05 * torch.sin(1000 * boxes)).clamp(0.01, 0.99)
    return torch.where(boxes[:, 0] > 0.6, (labels + 1) % num_classes, labels), moved


def run(output: Path, total_batch: int, options: list[str]) -> None:
    """Train and save."""
    args = main.parse_args(["-m", "dn_dab_detr", *SIZES.split(), *PLACE.split(), *options])
    init_distributed_mode(args)
    torch.manual_seed(0)
    model, criterion, _ = build_model(args)
    wrapped = wrap_model(model, torch.device("cpu"))
    groups = parameter_groups(model, lr=args.lr, lr_backbone=args.lr_backbone, backbone_names=args.lr_backbone_names)
    optimizer = build_optimizer(groups, lr=args.lr, weight_decay=args.weight_decay, sgd=False)
    count = STEPS * total_batch
    sampler = TrainBatchSampler(
        count, batch_size=total_batch // get_world_size(), rank=get_rank(), world_size=get_world_size()
    )
    batches = Batches(FixedPictures(count, total_batch), sampler)
    with mock.patch("models.dn_components.add_noise", noise_from_boxes):
        stats = train_one_epoch(wrapped, criterion, batches, optimizer, torch.device("cpu"), 0, args=args)
    if is_main_process():
        torch.save({"model": model.state_dict(), "stats": stats}, output)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    # After the wrapped model is gone, as main.py does.
    destroy_process_group()
