"""Samplers: what each rank sees, and resuming."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from datasets.annotations import DatasetError
from datasets.samplers import EvalBatchSampler, TrainBatchSampler


def train_batches(num_images: int, batch_size: int, world_size: int, epoch: int = 0) -> list[list[list[int]]]:
    ranks = []
    for rank in range(world_size):
        sampler = TrainBatchSampler(num_images, batch_size=batch_size, seed=7, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
    return ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_images", "batch_size"), [(24, 4), (25, 4), (10, 3)])
def test_train_batches_are_those_of_torchs_distributed_sampler(
    num_images: int, batch_size: int, world_size: int
) -> None:
    for epoch in (0, 3):
        for rank, batches in enumerate(train_batches(num_images, batch_size, world_size, epoch)):
            images = TensorDataset(torch.zeros(num_images))
            reference: DistributedSampler[int] = DistributedSampler(images, world_size, rank, shuffle=True, seed=7)
            reference.set_epoch(epoch)
            order = list(reference)
            count = len(order) // batch_size
            assert batches == [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_train_ranks_take_equal_steps_and_share_the_images(world_size: int) -> None:
    ranks = train_batches(24, 4, world_size)
    assert len({len(batches) for batches in ranks}) == 1
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert sorted(seen) == list(range(24))


def test_train_order_changes_with_epoch_and_seed() -> None:
    sampler = TrainBatchSampler(20, batch_size=20, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TrainBatchSampler(20, batch_size=20, seed=2)) != first


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_train_sampler_goes_on_after_the_batches_done(world_size: int, done: int) -> None:
    for rank in range(world_size):
        sampler = TrainBatchSampler(26, batch_size=4, seed=7, rank=rank, world_size=world_size)
        sampler.set_epoch(5)
        whole = list(sampler)
        resumed = TrainBatchSampler(26, batch_size=4, seed=7, rank=rank, world_size=world_size)
        resumed.set_epoch(5, first_batch=done)
        assert list(resumed) == whole[done:]
        assert len(resumed) == len(whole)
        resumed.set_epoch(6)
        sampler.set_epoch(6)
        assert list(resumed) == list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [24, 26, 47])
def test_grouped_batches_hold_one_group_and_the_same_number_of_images(num_images: int, world_size: int) -> None:
    groups = [int(index % 3 == 0) for index in range(num_images)]
    ranks = []
    for rank in range(world_size):
        place = {"batch_size": 4, "seed": 7, "rank": rank, "world_size": world_size}
        sampler = TrainBatchSampler(num_images, groups=groups, **place)
        sampler.set_epoch(3)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == len(TrainBatchSampler(num_images, **place))
        resumed = TrainBatchSampler(num_images, groups=groups, **place)
        resumed.set_epoch(3, first_batch=1)
        assert list(resumed) == ranks[-1][1:]
        sampler.set_epoch(4)
        assert list(sampler) != ranks[-1]
    batches = [batch for rank in ranks for batch in rank]
    assert {len(batch) for batch in batches} == {4}
    # Two groups leave at most three images each, which share two batches at the end.
    assert sum(len({groups[index] for index in batch}) > 1 for batch in batches) <= 2
    seen = [index for batch in batches for index in batch]
    if num_images == 24:
        assert sorted(seen) == list(range(24))
    # As without groups: images are repeated only to make the ranks even.
    assert len(seen) - len(set(seen)) <= -num_images % world_size


def test_groups_must_fit_the_data_set() -> None:
    with pytest.raises(ValueError, match="group of each of 24 images, got 3"):
        TrainBatchSampler(24, batch_size=4, groups=[0, 1, 0])


def test_train_sampler_refuses_what_cannot_be() -> None:
    with pytest.raises(DatasetError, match="3 images on 2 processes make no batch of 4"):
        TrainBatchSampler(3, batch_size=4, world_size=2)
    with pytest.raises(DatasetError, match="cannot resume after batch 9 of an epoch of 6"):
        TrainBatchSampler(24, batch_size=4).set_epoch(0, first_batch=9)
    for kind in (TrainBatchSampler, EvalBatchSampler):
        with pytest.raises(ValueError, match="rank must be in"):
            kind(24, batch_size=4, rank=2, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [0, 1, 2, 7, 12])
def test_eval_sampler_gives_every_image_once(num_images: int, world_size: int) -> None:
    samplers = [
        EvalBatchSampler(num_images, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(num_images))
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    assert all(1 <= len(batch) <= 2 for batches in ranks for batch in batches)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
