"""Ratios of times measured in one run: both sides take turns, so that a busy machine slows both."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .ops import device_name, interleave

ROUNDS = 7
# Seconds on the wall, or seconds this process computed, which others that use the machine change little.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True)
class Ratio:
    """How many times faster (or smaller) `ours` is than `baseline`.

    Attributes:
        name: what was measured; ours, baseline: the two sides in words.
        median, smallest, largest: of the ratios baseline / ours of the single rounds.
        ours_value, baseline_value: medians, in `unit`.
        required, aim: targets, None where there is none.
    """

    name: str
    ours: str
    baseline: str
    median: float
    smallest: float
    largest: float
    ours_value: float
    baseline_value: float
    unit: str = "s"
    required: float | None = None
    aim: float | None = None


def compare(
    name: str,
    calls: dict[str, Callable[[], None]],
    *,
    rounds: int = ROUNDS,
    device: torch.device | None = None,
    required: float | None = None,
    aim: float | None = None,
    clock: str = "wall",
) -> Ratio:
    """Time two calls in turn; assert before that their results are equal.

    Args:
        name: what is measured.
        calls: exactly two, the baseline first, by their names.
        rounds: rounds after one that warms up.
        device: where they compute, by default the CPU.
        required, aim: targets of the ratio.
        clock: key of `CLOCKS`.
    """
    baseline, ours = calls
    seconds = interleave(calls, rounds, device or torch.device("cpu"), CLOCKS[clock])
    return ratio_of(name, seconds, ours=ours, baseline=baseline, required=required, aim=aim)


def ratio_of(
    name: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    ours: str,
    baseline: str,
    required: float | None = None,
    aim: float | None = None,
) -> Ratio:
    """Return the ratio of two sides that took turns.

    Args:
        name: what was measured; seconds: per call and round, by side.
        ours, baseline: two keys of `seconds`.
        required, aim: targets of the ratio.
    """
    ratios = [slow / fast for slow, fast in zip(seconds[baseline], seconds[ours], strict=True)]
    return Ratio(
        name=name,
        ours=ours,
        baseline=baseline,
        median=statistics.median(ratios),
        smallest=min(ratios),
        largest=max(ratios),
        ours_value=statistics.median(seconds[ours]),
        baseline_value=statistics.median(seconds[baseline]),
        required=required,
        aim=aim,
    )


def add_common_arguments(parser: argparse.ArgumentParser, *, clock: bool = True) -> None:
    """Add the options every comparison has; those that can read processor time have a `clock`."""
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds per comparison; medians are reported")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    if clock:
        parser.add_argument(
            "--clock", choices=CLOCKS, default="wall", help="process: for a machine that others use too"
        )
    parser.add_argument("--json", type=Path, help="add the figures to this file, one JSON object per line")


def report(ratios: Sequence[Ratio], json_lines: Path | None = None) -> None:
    """Print ratios as a Markdown table, and add them to a file of JSON lines."""
    print(f"\n{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| what | ours | against | ratio (smallest to largest) | ours | baseline | required / aim |")
    print("|---|---|---|---|---|---|---|")
    for ratio in ratios:
        target = "" if ratio.required is None else f"{ratio.required:g} / {ratio.aim:g}"
        print(
            f"| {ratio.name} | {ratio.ours} | {ratio.baseline} | {ratio.median:.2f} ({ratio.smallest:.2f} to "
            f"{ratio.largest:.2f}) | {ratio.ours_value:.4g} {ratio.unit} | {ratio.baseline_value:.4g} {ratio.unit} "
            f"| {target} |"
        )
    if json_lines is not None:
        with json_lines.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(ratio)) + "\n" for ratio in ratios)
