"""Batches of image indices: shuffled and resumable for training, every image exactly once for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .annotations import DatasetError


class TrainBatchSampler(Sampler[list[int]]):
    """Shuffled batches of one rank, those of torch's DistributedSampler with drop_last batches, as official.

    The order is a function of (seed, epoch) alone. A run that was stopped after k batches of an epoch goes on with
    ``set_epoch(epoch, first_batch=k)`` and sees exactly the batches it would have seen; the caller keeps k, because
    worker processes fetch ahead of what was trained on.

    Args:
        num_images: size of the data set.
        batch_size: images per batch and rank.
        seed: the same on all ranks.
        rank, world_size: this process among all.

    Raises:
        DatasetError: there are too few images for one batch.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
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
        mine = order[self.rank :: self.world_size]
        for batch in range(self.first_batch, len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _images_per_rank(self) -> int:
        return -(-self.num_images // self.world_size)


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
