"""Batches of image indices: shuffled and resumable for training, every image exactly once for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from .annotations import DatasetError


class TrainBatchSampler(Sampler[list[int]]):
    """Shuffled batches of one rank, those of torch's DistributedSampler with drop_last batches, as official.

    The order is a function of (seed, epoch) alone. A run that was stopped after k batches of an epoch goes on with
    ``set_epoch(epoch, first_batch=k)`` and sees exactly the batches it would have seen; the caller keeps k, because
    worker processes fetch ahead of what was trained on.

    With groups the same images of an epoch are put into batches of one group each, in the order in which batches fill
    up; what is left over of the groups at the end shares batches. Going on in mid-epoch with another batch size, which
    is exact without groups, then meets some images twice or not at all in that epoch.

    Args:
        num_images: size of the data set.
        batch_size: images per batch and rank.
        seed: the same on all ranks.
        rank, world_size: this process among all.
        groups: number of the group of every image; None does not group.

    Raises:
        DatasetError: there are too few images for one batch.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if groups is not None and len(groups) != num_images:
            raise ValueError(f"expected the group of each of {num_images} images, got {len(groups)}")
        self.groups = groups
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_batch = 0
        if len(self) == 0:
            raise DatasetError(
                f"{num_images} images on {world_size} processes make no batch of {batch_size}: lower --batch_size"
            )

    def __len__(self) -> int:
        """Number of batches of a whole epoch, wherever it starts."""
        return self._images_per_rank() // self.batch_size

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch to iterate over, and how many of its batches to leave out at the start."""
        if not 0 <= first_batch <= len(self):
            raise DatasetError(
                f"cannot resume after batch {first_batch} of an epoch of {len(self)}: data set, batch size or number "
                "of processes changed; resume with those of the checkpoint"
            )
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_images, generator=generator).tolist()
        # The first images fill the last round, so that every rank takes the same number of steps.
        order += order[: self._images_per_rank() * self.world_size - self.num_images]
        if self.groups is None:
            mine = order[self.rank :: self.world_size]
            batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        else:
            used = order[: len(self) * self.world_size * self.batch_size]
            batches = _batches_of_groups(used, self.groups, self.batch_size)[self.rank :: self.world_size]
        yield from batches[self.first_batch : len(self)]

    def _images_per_rank(self) -> int:
        return -(-self.num_images // self.world_size)


def _batches_of_groups(order: Sequence[int], groups: Sequence[int], batch_size: int) -> list[list[int]]:
    """Put indices into batches of one group, as they fill up, and the rest into mixed ones at the end."""
    batches: list[list[int]] = []
    waiting: dict[int, list[int]] = {}
    for index in order:
        batch = waiting.setdefault(groups[index], [])
        batch.append(index)
        if len(batch) == batch_size:
            batches.append(waiting.pop(groups[index]))
    left = [index for group in sorted(waiting) for index in waiting[group]]
    return batches + [left[start : start + batch_size] for start in range(0, len(left), batch_size)]


class EvalBatchSampler(Sampler[list[int]]):
    """Batches of one rank in the order of the data set; over all ranks every image comes exactly once.

    Differs from official, which repeats images until the ranks are even and counts them twice in the losses. The
    price: ranks may differ by one batch, so nothing in an evaluation step may wait for the other ranks.

    Args:
        num_images: size of the data set.
        batch_size: images per batch and rank; the last batch may be smaller.
        rank, world_size: this process among all.
    """

    def __init__(self, num_images: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        self.batch_size = batch_size
        self._mine = range(rank, num_images, world_size)

    def __len__(self) -> int:
        return -(-len(self._mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._mine), self.batch_size):
            yield list(self._mine[start : start + self.batch_size])
