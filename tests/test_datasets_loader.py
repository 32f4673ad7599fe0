"""Loading: the batches do not depend on workers, batch size or the point of resumption, and disturb no generator."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch

from datasets import (
    DatasetError,
    TrainBatchSampler,
    build_data_loader,
    build_dataset,
    collate_fn,
    naming_dead_workers,
)
from datasets.coco import CocoDetection
from datasets.loader import Batch, sample_randomness
from tests.dataset_helpers import small_options, write_data_set


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    root = write_data_set(tmp_path_factory.mktemp("data"), num_train=9)
    return build_dataset("train", small_options(root))


def epoch_batches(
    dataset: CocoDetection,
    *,
    epoch: int,
    num_workers: int = 0,
    first_batch: int = 0,
    seed: int = 3,
    batch_size: int = 2,
) -> list[Batch]:
    sampler = TrainBatchSampler(len(dataset), batch_size=batch_size, seed=1)
    loader = build_data_loader(dataset, batch_sampler=sampler, num_workers=num_workers, seed=seed)
    sampler.set_epoch(epoch, first_batch)
    return list(loader)


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for (samples_a, targets_a), (samples_b, targets_b) in zip(a, b, strict=True):
        assert torch.equal(samples_a.tensors, samples_b.tensors)
        assert torch.equal(samples_a.mask, samples_b.mask)
        for target_a, target_b in zip(targets_a, targets_b, strict=True):
            assert all(torch.equal(target_a[name], target_b[name]) for name in target_b)


def pictures(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """Unpadded picture of every image id."""
    return {
        int(target["image_id"]): samples.tensors[i, :, : target["size"][0], : target["size"][1]]
        for samples, targets in batches
        for i, target in enumerate(targets)
    }


def test_collate_pads_and_keeps_targets() -> None:
    targets = [{"labels": torch.tensor([1])}, {"labels": torch.tensor([2, 3])}]
    samples, collected = collate_fn([(torch.ones(3, 4, 6), targets[0]), (torch.ones(3, 5, 2), targets[1])])
    assert samples.tensors.shape == (2, 3, 5, 6)
    assert samples.mask[1].tolist() == [[False] * 2 + [True] * 4] * 5
    assert collected == tuple(targets)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_padded_to_multiples(dataset: CocoDetection, num_workers: int) -> None:
    sampler = TrainBatchSampler(len(dataset), batch_size=2, seed=1)
    loader = build_data_loader(dataset, batch_sampler=sampler, num_workers=num_workers, seed=3, size_multiple=32)
    sampler.set_epoch(1)
    plain = epoch_batches(dataset, epoch=1)
    bucketed = list(loader)
    for (samples, targets), (_, expected) in zip(bucketed, plain, strict=True):
        assert all(size % 32 == 0 for size in samples.tensors.shape[-2:]) and samples.padded
        assert all(torch.equal(t["boxes"], e["boxes"]) for t, e in zip(targets, expected, strict=True))
    # Boxes refer to the pictures, which are the same.
    one, other = pictures(bucketed), pictures(plain)
    assert all(torch.equal(one[image_id], other[image_id]) for image_id in other)


def test_batches_do_not_depend_on_workers(dataset: CocoDetection) -> None:
    expected = epoch_batches(dataset, epoch=2)
    assert len(expected) == 4
    for num_workers in (1, 2):
        assert_same(epoch_batches(dataset, epoch=2, num_workers=num_workers), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_epoch_gives_the_same_batches(dataset: CocoDetection, num_workers: int) -> None:
    whole = epoch_batches(dataset, epoch=1)
    assert_same(epoch_batches(dataset, epoch=1, num_workers=num_workers, first_batch=3), whole[3:])


def test_one_loader_serves_several_epochs(dataset: CocoDetection) -> None:
    # The workers live on; each epoch must still get its own order and its own random numbers.
    sampler = TrainBatchSampler(len(dataset), batch_size=2, seed=1)
    loader = build_data_loader(dataset, batch_sampler=sampler, num_workers=2, seed=3)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert_same(list(loader), epoch_batches(dataset, epoch=epoch))
    assert len(loader) == 4


def test_loader_can_be_left_in_the_middle(dataset: CocoDetection) -> None:
    sampler = TrainBatchSampler(len(dataset), batch_size=2, seed=1)
    loader = build_data_loader(dataset, batch_sampler=sampler, num_workers=2, seed=3)
    next(iter(loader))
    sampler.set_epoch(4)
    assert_same(list(loader), epoch_batches(dataset, epoch=4))


def test_augmentation_belongs_to_the_image_not_the_batch(dataset: CocoDetection) -> None:
    pairs, triples = (pictures(epoch_batches(dataset, epoch=0, batch_size=size)) for size in (2, 3))
    common = pairs.keys() & triples.keys()
    assert len(common) == 8
    assert all(torch.equal(pairs[image_id], triples[image_id]) for image_id in common)


def test_augmentation_differs_between_epochs_and_seeds(dataset: CocoDetection) -> None:
    def shapes_and_sums(epoch: int, seed: int) -> list[tuple[torch.Size, float]]:
        batches = pictures(epoch_batches(dataset, epoch=epoch, seed=seed, batch_size=9))
        return [(batches[i].shape, float(batches[i].sum())) for i in sorted(batches)]

    base = shapes_and_sums(0, 3)
    for other in (shapes_and_sums(1, 3), shapes_and_sums(0, 4)):
        # A few of nine pictures may coincide: one branch has only four outcomes.
        assert sum(a != b for a, b in zip(base, other, strict=True)) >= 4


def test_loading_takes_no_random_number_from_training(dataset: CocoDetection) -> None:
    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state()
    epoch_batches(dataset, epoch=0)
    epoch_batches(dataset, epoch=0, num_workers=1)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_sample_randomness_is_restored_after_an_error() -> None:
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyError), sample_randomness(1, 2, 3):
        random.random()
        torch.rand(2)
        raise KeyError
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_sample_randomness_depends_on_all_three_numbers() -> None:
    draws = set()
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        with sample_randomness(*key):
            draws.add((random.random(), float(torch.rand(()))))
    assert len({python for python, _ in draws}) == len({value for _, value in draws}) == 4


def test_broken_connection_to_a_killed_worker_names_it(dataset: CocoDetection) -> None:
    sampler = TrainBatchSampler(len(dataset), batch_size=2, seed=1)
    loader = build_data_loader(dataset, batch_sampler=sampler, num_workers=1, seed=3)
    batches = iter(loader)
    next(batches)
    pid = loader.workers()[0].pid
    # Torch may tell of the death before the connection is found broken.
    with pytest.raises(DatasetError, match=rf"loading process {pid} .*Killed"), naming_dead_workers(loader, None):
        os.kill(pid, signal.SIGKILL)
        raise ConnectionResetError("Connection reset by peer")


def test_broken_connection_to_somebody_else_is_not_a_dead_worker(dataset: CocoDetection) -> None:
    sampler = TrainBatchSampler(len(dataset), batch_size=2, seed=1)
    loader = build_data_loader(dataset, batch_sampler=sampler, num_workers=0, seed=3)
    with pytest.raises(ConnectionResetError), naming_dead_workers(loader):
        raise ConnectionResetError("Connection reset by peer")
