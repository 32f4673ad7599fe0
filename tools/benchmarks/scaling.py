"""Time inference as one thing grows: image size, queries, classes; one table and one plot for each.

Models have random weights and are made ready for inference. Each is timed part by part, medians over the rounds, so
that the table and the plot say which part grows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import main as program
from models import build_model, list_models
from models.inference import prepare_for_inference
from util.nested_tensor import NestedTensor
from util.plots import COLORS

from .compare import add_common_arguments
from .model import PARTS, REST, measure_parts
from .ops import device_name

MODELS = ["dab_detr", "deformable_detr"]
# What grows -> its values; the rest stays as in `BASE`.
GROWTH = {
    "size": [256, 384, 512, 640, 800],
    "queries": [100, 300, 900, 1800],
    "classes": [80, 365, 1203],
}
BASE = {"size": 480, "queries": 300, "classes": 91}
AXES = {"size": "shorter side of the image in pixels (4:3)", "queries": "queries", "classes": "classes"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.add_argument("--models", nargs="+", choices=list_models(), default=MODELS)
    parser.add_argument("--grow", nargs="+", choices=list(GROWTH), default=list(GROWTH))
    parser.add_argument("--values", nargs="+", type=int, help="values of the one thing that grows")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="options of main.py")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the plots scaling_*.png")
    add_common_arguments(parser, clock=False)


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the tables, draw the plots; return the exit code. `arguments` are what `args` came from."""
    torch.set_num_threads(args.threads)
    if args.values and len(args.grow) != 1:
        print("expected one thing that grows for --values: pass --grow size, queries or classes")
        return 1
    print(f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for what in args.grow:
        values = args.values or GROWTH[what]
        curves = {name: grow(name, what, values, args) for name in args.models}
        print_table(what, values, curves)
        draw(what, values, curves, args.output / f"scaling_{what}.png")
    return 0


def grow(name: str, what: str, values: Sequence[int], args: argparse.Namespace) -> list[dict[str, float]]:
    """Return the seconds of every part of a model, for every value of what grows."""
    return [measure({**BASE, what: value}, name, args) for value in values]


def measure(sizes: dict[str, int], name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of every part of a model of these sizes; medians over rounds."""
    torch.manual_seed(0)
    argv = ["-m", name, "--backbone_weights", "none", "--lr_backbone", "0"]
    argv += ["--options", *args.options] if args.options else []
    argv += ["--num_queries", str(sizes["queries"]), "--num_classes", str(sizes["classes"])]
    model: nn.Module = prepare_for_inference(build_model(program.parse_args(argv))[0])
    shape = (sizes["size"], sizes["size"] * 4 // 3)
    batch = NestedTensor(torch.randn(1, 3, *shape), torch.zeros((1, *shape), dtype=torch.bool), padded=False)
    with torch.inference_mode():
        model(batch)  # warms up
        return measure_parts(model, batch, torch.device("cpu"), args.rounds)[0]


def print_table(what: str, values: Sequence[int], curves: dict[str, list[dict[str, float]]]) -> None:
    """Print milliseconds in all and per part, and by how much they grow with what grows."""
    parts = [*PARTS, REST]
    print(f"\n| model | {what} | ms | growth | {' | '.join(parts)} |")
    print("|---" * (4 + len(parts)) + "|")
    for name, curve in curves.items():
        first = sum(curve[0].values())
        for value, seconds in zip(values, curve, strict=True):
            total = sum(seconds.values())
            each = " | ".join(f"{seconds[part] * 1e3:.0f}" for part in parts)
            print(f"| {name} | {value} | {total * 1e3:.0f} | {total / first:.2f} | {each} |")


def draw(what: str, values: Sequence[int], curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the seconds of every model, its parts stacked, side by side."""
    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        heights = [[seconds[part] for seconds in curve] for part in (*PARTS, REST)]
        axis.stackplot(values, heights, labels=[*PARTS, REST], colors=COLORS)
        axis.set_title(name)
        axis.set_xlabel(AXES[what])
        axis.set_xticks(values)
        axis.margins(x=0)
    axes[0].set_ylabel("seconds per image")
    axes[0].legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=80)
