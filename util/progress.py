"""How far a loop has come: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

import torch

from .logger import ERASE_LINE, METRIC_LOGGER

T = TypeVar("T")
BAR_WIDTH = 20


def track(
    items: Iterable[T],
    *,
    total: int,
    header: str,
    describe: Callable[[], str],
    every: int = 10,
    show: bool = True,
    stream: TextIO | None = None,
) -> Iterator[T]:
    """Yield the items and tell rate, memory and time left, every few items and after the last.

    Args:
        items: what to go through.
        total: how many items there are.
        header: what is going on, e.g. "epoch 3".
        describe: gives the current losses; called only when they are shown, on every process alike.
        every: items between two tellings.
        show: False tells nothing but still calls `describe`.
        stream: where a bar is drawn when it is a terminal; default stdout.
    """
    stream = sys.stdout if stream is None else stream
    log = logging.getLogger(METRIC_LOGGER)
    start = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        if done % every and done != total:
            continue
        losses = describe()
        if not show:
            continue
        line = progress_line(done, total, time.monotonic() - start, losses)
        log.info("%s %s", header, line)
        if stream.isatty():
            filled = BAR_WIDTH * done // max(total, 1)
            bar = f"{header} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {line}"
            stream.write(ERASE_LINE + bar[: shutil.get_terminal_size().columns - 1])
            stream.flush()
    if show and stream.isatty():
        stream.write(ERASE_LINE)


def progress_line(done: int, total: int, seconds: float, losses: str) -> str:
    """Return "done/total, losses, rate, memory, time left" of a loop that has run for some seconds."""
    rate = done / max(seconds, 1e-9)
    left = format_seconds(max(total - done, 0) / rate)
    return f"{done}/{total}  {losses}  {rate:.2f} it/s  {peak_memory_mib():.0f} MiB  {left} left"


def peak_memory_mib() -> float:
    """Return the most memory used so far: of the GPU when one is in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux counts in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def format_seconds(seconds: float) -> str:
    """Return h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
