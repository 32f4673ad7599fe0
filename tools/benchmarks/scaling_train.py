"""Measure what a training step costs as the batch, the objects of an image or the denoising groups grow.

One axis grows at a time, the others stay at 2 images, 7 objects and 5 groups. Every point is measured in every round,
all points in turn; the median of the rounds is shown. One plot per axis: time of the parts of a step, and the memory
that torch allocates at most during it, above the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from util.step import autocast, weighted_sum

from .compare import CLOCKS, add_common_arguments
from .ops import synchronize
from .training_step import Step, build_step, peak_bytes

AXES: dict[str, tuple[int, ...]] = {"batch": (1, 2, 4), "objects": (5, 20, 80), "groups": (1, 5, 20)}
BASE = {"batch": 2, "objects": 7, "groups": 5}
LABELS = {"batch": "images per batch", "objects": "objects per image", "groups": "denoising groups"}
TIMES = ("forward", "matching and losses", "backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common_arguments(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("-m", "--modelname", default="dn_dab_deformable_detr")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="options of main.py")
    parser.add_argument("--size", nargs=2, type=int, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", nargs="+", type=int, default=list(values), help=f"{LABELS[axis]} to measure")
    parser.add_argument("--plots", type=Path, help="folder for one plot per axis")


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the tables, draw the plots, and return the exit code; `arguments` are what `args` came from."""
    torch.set_num_threads(args.threads)
    for axis in args.axes:
        points = measure_axis(args, axis, getattr(args, axis))
        print_axis(axis, points)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(point) + "\n" for point in points)
        if args.plots:
            args.plots.mkdir(parents=True, exist_ok=True)
            draw(axis, points, args.plots / f"scaling_train_{axis}.png")
    return 0


def measure_axis(args: argparse.Namespace, axis: str, values: Sequence[int]) -> list[dict[str, Any]]:
    """Return for every value its median seconds per part and the peak of memory in bytes."""
    steps = [make_point(args, {**BASE, axis: value}) for value in values]
    seconds: list[list[tuple[float, ...]]] = [[] for _ in steps]
    for number in range(args.rounds + 1):
        for step, taken in zip(steps, seconds, strict=True):
            took = time_parts(step, args.clock)
            if number:  # the first round warms up
                taken.append(took)
    points = []
    for value, step, taken in zip(values, steps, seconds, strict=True):
        step.optimizer.zero_grad(set_to_none=True)
        medians = [statistics.median(column) for column in zip(*taken, strict=True)]
        point: dict[str, Any] = {"axis": axis, "value": value, **dict(zip(TIMES, medians, strict=True))}
        points.append(point | {"peak_bytes": peak_bytes(step.gradients)})
        step.optimizer.zero_grad(set_to_none=True)
    return points


def make_point(args: argparse.Namespace, sizes: dict[str, int]) -> Step:
    """Build the step of one point."""
    options = ["-m", args.modelname, "--use_dn", "--scalar", str(sizes["groups"])]
    options += ["--options", *args.options] if args.options else []
    size = (args.size[0], args.size[1])
    return build_step(options, size=size, batch=sizes["batch"], objects=sizes["objects"], device=args.device)


def time_parts(step: Step, clock: str) -> tuple[float, ...]:
    """Return the seconds of the parts of one step, in the order of `TIMES`."""
    samples, targets = step.batch
    device = samples.tensors.device
    step.optimizer.zero_grad(set_to_none=True)
    marks = [now(device, clock)]
    with autocast(device, enabled=step.args.amp, dtype=step.args.amp_dtype):
        outputs = step.model(samples, targets)
        marks.append(now(device, clock))
        losses = step.criterion(outputs, targets)
        weights: dict[str, float] = step.criterion.weight_dict  # type: ignore[assignment]
        total = weighted_sum(losses, weights)
    marks.append(now(device, clock))
    total.backward()
    marks.append(now(device, clock))
    return tuple(end - start for start, end in pairwise(marks))


def now(device: torch.device, clock: str) -> float:
    """Return the time when the device has done everything asked of it."""
    synchronize(device)
    return CLOCKS[clock]()


def print_axis(axis: str, points: Sequence[dict[str, Any]]) -> None:
    """Print one line per point."""
    print(f"\n| {LABELS[axis]} | " + " | ".join(f"{part}, s" for part in TIMES) + " | peak memory, MiB |")
    print("|---" * (len(TIMES) + 2) + "|")
    for point in points:
        times = " | ".join(f"{point[part]:.3f}" for part in TIMES)
        print(f"| {point['value']} | {times} | {point['peak_bytes'] / 2**20:.0f} |")


def draw(axis: str, points: Sequence[dict[str, Any]], out_png: Path) -> None:
    """Draw seconds and memory over the values of an axis."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    values = [point["value"] for point in points]
    for part in TIMES:
        left.plot(values, [point[part] for point in points], marker="o", label=part)
    right.plot(values, [point["peak_bytes"] / 2**20 for point in points], marker="o", color="black")
    for axes, title in ((left, "seconds of a step"), (right, "peak memory of a step, MiB")):
        axes.set(xscale="log", title=title, xlabel=LABELS[axis])
        axes.set_xticks(values, [str(value) for value in values], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_yscale("log")  # the parts differ by a hundred
    right.set_ylim(bottom=0)
    left.legend(fontsize="small")
    figure.savefig(out_png, dpi=90)
