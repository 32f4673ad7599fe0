"""Batches from a data set. Each sample draws its own random numbers, whoever loads it and whenever.

A sample's augmentation is seeded by (seed, epoch, image index) right before the sample is loaded, in python's and
torch's generators, which the transforms draw from. So it does not depend on the number of workers, on the batch the
image falls into, or on where a stopped run went on. The state of both generators is put back afterwards: loading in
the main process takes no random number from training.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

from .annotations import DatasetError, Target

Sample = tuple[Tensor, Target]
Batch = tuple[NestedTensor, tuple[Target, ...]]


def collate_fn(batch: Sequence[Sample], size_multiple: int = 1) -> Batch:
    """Pad a list of samples to one batch.

    Args:
        batch: images (3, H, W) and their targets.
        size_multiple: height and width of the batch are rounded up to multiples of so many pixels.

    Returns:
        (NestedTensor of B images, B targets).
    """
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(images, size_multiple), targets


def build_data_loader(
    dataset: Dataset[Sample],
    *,
    batch_sampler: Sampler[list[int]],
    num_workers: int,
    seed: int = 0,
    pin_memory: bool = False,
    size_multiple: int = 1,
) -> DataLoader[Any]:
    """Build the loader of a data set.

    Args:
        dataset: yields (image (3, H, W), target). One with a method ``load`` gives uint8 pixels there, which travel
            faster and become floats on the device (`util.step.to_device`), to the same values.
        batch_sampler: `TrainBatchSampler` or `EvalBatchSampler`; its ``epoch``, if it has one, enters the seeds.
        num_workers: loading processes, 0 = load in this one.
        seed: base of the samples' seeds.
        pin_memory: copy batches into page-locked memory, for faster transfer to a GPU.
        size_multiple: see `collate_fn`.

    Returns:
        Loader of (NestedTensor, targets); its length is that of a whole epoch. A `DatasetError` of a sample is raised
        where the loader is iterated, with its sentence alone, from workers too.
    """
    samples = _SeededSamples(dataset, seed, num_workers)
    return _Loader(
        samples,
        batch_sampler=_EpochKeys(batch_sampler),
        num_workers=num_workers,
        collate_fn=partial(_collate_or_pass_error, size_multiple=size_multiple),
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=samples.start_worker,
        # Its own generator: the loader would otherwise draw a number from training's each time it is iterated.
        generator=torch.Generator().manual_seed(seed),
    )


@contextlib.contextmanager
def naming_dead_workers(*loaders: DataLoader[Any] | None) -> Iterator[None]:
    """Turn torch's words about a loading process that died into a sentence with the picture it was loading.

    Torch notices the death in the main process wherever that is, in a training step for example.

    Args:
        loaders: those whose workers may die; None is passed over.

    Raises:
        DatasetError: a worker died.
    """
    own = [loader for loader in loaders if isinstance(loader, _Loader)]
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        death = _death_in(error) or (None if isinstance(error, RuntimeError) else _await_death(own))
        if death is None:
            raise
        pids, how = death
        pictures = [name for loader in own for name in loader.pictures_in_work(pids)]
        while_loading = f" while loading {', '.join(pictures)}" if pictures else " between two pictures"
        raise DatasetError(
            f"loading process {', '.join(map(str, sorted(pids)))} {how}{while_loading}; if memory is short lower "
            "--num_workers, then go on with --resume auto"
        ) from error


def _death_in(error: BaseException) -> tuple[set[int], str] | None:
    """Find torch's words about dead workers: their process ids and how they ended."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
    return found and ({int(pid) for pid in found[1].split(",")}, found[2].strip().rstrip("."))


def _await_death(loaders: Sequence[_Loader]) -> tuple[set[int], str] | None:
    """Wait for a worker's end; None if none comes, then the connection broke for another reason.

    A batch is fetched from the worker that made it. When that worker is killed in between, the connection breaks
    before its death is known.
    """
    workers = [worker for loader in loaders for worker in loader.workers()]
    if not workers:
        return None
    # Torch tells of a death in a signal handler, that is, wherever this process is.
    with contextlib.suppress(RuntimeError):
        wait([worker.sentinel for worker in workers], timeout=10)
        time.sleep(1)
    codes = {worker.pid: worker.exitcode for worker in workers if worker.pid and worker.exitcode}
    if not codes:
        return None
    return set(codes), "exited unexpectedly: " + ", ".join(
        signal.strsignal(-code) or "killed" if code < 0 else f"status {code}" for code in codes.values()
    )


@contextlib.contextmanager
def sample_randomness(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed python's and torch's (CPU) generators for one sample and put their state back afterwards."""
    low, high = np.random.SeedSequence([seed, epoch, index]).generate_state(2).tolist()
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    random.seed(low)
    # Not torch.manual_seed, which would reseed the GPUs too.
    torch.default_generator.manual_seed(high)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.default_generator.set_state(torch_state)


class _EpochKeys(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): workers that live on from epoch to epoch learn the epoch with the index."""

    def __init__(self, batch_sampler: Sampler[list[int]]) -> None:
        self.batch_sampler = batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = getattr(self.batch_sampler, "epoch", 0)
        for batch in self.batch_sampler:
            yield [(epoch, index) for index in batch]


class _Loader(DataLoader[Any]):
    """A loader that raises the data set's errors in this process.

    Raised inside a worker, torch would turn the sentence into a page of traceback.
    """

    def workers(self) -> list[BaseProcess]:
        """Return the loading processes that were started."""
        return getattr(self._iterator, "_workers", [])

    def pictures_in_work(self, pids: set[int]) -> list[str]:
        """Return what the workers with these process ids were loading last."""
        return cast("_SeededSamples", self.dataset).pictures_in_work(pids)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DatasetError):
                # A new one: an exception held by its own frame is a cycle, and torch takes 5 seconds per worker to stop
                # workers found by the garbage collector.
                raise DatasetError(str(batch))
            yield batch


def _collate_or_pass_error(batch: Sequence[Sample | DatasetError], size_multiple: int) -> Batch | DatasetError:
    error = next((sample for sample in batch if isinstance(sample, DatasetError)), None)
    return error or collate_fn(cast("Sequence[Sample]", batch), size_multiple)


class _SeededSamples(Dataset[Sample | DatasetError]):
    """Samples of a data set by (epoch, index), each with its own random numbers; the error in place of a bad one."""

    def __init__(self, dataset: Dataset[Sample], seed: int, num_workers: int) -> None:
        self.dataset = dataset
        self._load = getattr(dataset, "load", dataset.__getitem__)
        self.seed = seed
        # Per worker its process id and the index it loads, -1 between two; shared, so that they outlive the worker.
        self._in_work = torch.full((num_workers, 2), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, key: tuple[int, int]) -> Sample | DatasetError:
        epoch, index = key
        self._note(index)
        with sample_randomness(self.seed, epoch, index):
            try:
                return self._load(index)
            except DatasetError as error:
                return error
            finally:
                self._note(-1)

    def start_worker(self, worker_id: int) -> None:
        """Prepare a worker: tell its process id, leave stop signals to the main process."""
        self._in_work[worker_id, 0] = os.getpid()
        # Slurm signals every process of a job. A worker that obeyed would make the step fail that is to be finished.
        signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=_obey_only, args=(os.getppid(), signals), daemon=True).start()

    def pictures_in_work(self, pids: set[int]) -> list[str]:
        """Return what the workers with these process ids were loading last."""
        indices = [index for pid, index in self._in_work.tolist() if pid in pids and index >= 0]
        describe = getattr(self.dataset, "describe", "sample {}".format)
        return [describe(index) for index in indices]

    def _note(self, index: int) -> None:
        worker = get_worker_info()
        if worker is not None:
            self._in_work[worker.id, 1] = index


def _obey_only(parent: int, signals: set[signal.Signals]) -> None:
    # The loader ends workers that do not end by themselves with SIGTERM: from the parent it has to work.
    while signal.sigwaitinfo(signals).si_pid != parent:
        pass
    os._exit(0)
