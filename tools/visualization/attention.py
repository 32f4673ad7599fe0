"""Draw where queries look: cross-attention weights over the picture, or sampling points of deformable attention.

Example::

    python -m tools.visualize attention outputs/demo/checkpoint.pth picture.jpg --output attention.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tools.detector import Detector, load_detector
from util.errors import OptionError

from .capture import DenseAttention, SampledAttention, trace_cross_attention, trace_layers
from .drawing import (
    add_query_arguments,
    choose_queries,
    color_of,
    describe,
    draw_reference,
    make_panels,
    prepare,
    read_picture,
    save,
    show_picture,
)

HEAT = "inferno"
LARGEST_POINT = 70.0  # square points of paper, of the heaviest sampling point of a panel
OUTLINE = (1.0, 1.0, 1.0, 0.7)
LEVEL_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    add_query_arguments(parser, count=3)
    parser.add_argument("--head", type=int, metavar="N", help="one attention head; left out: the mean of all")


def run(options: argparse.Namespace, model_options: Sequence[str]) -> None:
    """Draw what the command line asks for."""
    detector = load_detector(options.checkpoint, options=model_options)
    picture = read_picture(options.image)
    draw_attention(detector, picture, options.output, count=options.count, queries=options.queries, head=options.head)


def draw_attention(
    detector: Detector,
    picture: Image.Image,
    out_path: Path,
    *,
    count: int = 3,
    queries: Sequence[int] | None = None,
    head: int | None = None,
) -> list[int]:
    """Draw a row per query and a column per decoder layer, each with the anchor the layer started from.

    Args:
        picture: RGB; out_path: PNG or SVG.
        count: queries drawn, best first; queries: draw these instead.
        head: one attention head, None for all.

    Returns:
        The queries drawn.

    Raises:
        OptionError: there is no such query or head.
    """
    num_heads = detector.args.nheads
    if head is not None and not 0 <= head < num_heads:
        raise OptionError(f"expected --head from 0 to {num_heads - 1}, got {head}")
    heads = slice(None) if head is None else slice(head, head + 1)
    image, _ = prepare(detector, picture)
    trace = trace_layers(detector.model, image)
    attention = trace_cross_attention(detector.model, image)
    chosen = choose_queries(trace.probabilities[-1], queries, count)
    figure, axes = make_panels(len(chosen), len(attention), picture)
    for number, query in enumerate(chosen):
        color = color_of(number)
        for layer, (axis, seen) in enumerate(zip(axes[number], attention, strict=True)):
            show_picture(axis, picture, faded=True)
            if isinstance(seen, DenseAttention):
                draw_heat(axis, heat_map(seen, query, heads), picture)
            else:
                draw_points(axis, seen, query, heads, picture)
            draw_reference(axis, trace.references[layer][query], picture, color, width=2.0)
            if number == 0:
                axis.set_title(f"layer {layer + 1}")
        text = describe(trace.probabilities[-1, query], detector.class_names)
        axes[number, 0].set_ylabel(f"query {query}\n{text}")
    if isinstance(attention[0], SampledAttention):
        marks = [
            Line2D([], [], marker="o", linestyle="", color=LEVEL_COLORS[i % len(LEVEL_COLORS)], label=f"level {i + 1}")
            for i in range(attention[0].weights.shape[2])
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    save(figure, out_path)
    return chosen


def heat_map(attention: DenseAttention, query: int, heads: slice = slice(None)) -> Tensor:
    """Add up the levels of one query on the grid of the finest one.

    A coarser token's weight is spread evenly over the finer tokens it covers.

    Returns:
        (h, w) of the finest level, mean of the heads, adding up to 1.
    """
    finest = attention.maps[0].shape[-2:]
    total = torch.zeros(finest)
    for level in attention.maps:
        weights = level[heads, query].mean(0)
        spread = F.interpolate(weights[None, None], size=finest, mode="nearest-exact")[0, 0]
        # Levels need not divide each other: what matters is that the level keeps its share.
        total += spread * (weights.sum() / spread.sum().clamp(min=1e-12))
    return total


def draw_heat(axis: Axes, heat: Tensor, picture: Image.Image) -> None:
    """Lay a heat map over the picture, opaque where it is hottest."""
    relative = (heat / heat.max().clamp(min=1e-12)).numpy()
    colors = matplotlib.colormaps[HEAT](0.25 + 0.7 * relative)
    colors[..., 3] = 0.9 * relative**0.7
    axis.imshow(colors, extent=(0, picture.width, picture.height, 0), interpolation="nearest")


def draw_points(axis: Axes, attention: SampledAttention, query: int, heads: slice, picture: Image.Image) -> None:
    """Draw the sampling points of one query, larger and less transparent where they weigh more, a colour per level."""
    weights = attention.weights[query, heads]
    places = attention.locations[query, heads] * torch.tensor([picture.width, picture.height])
    relative = weights / weights.max().clamp(min=1e-12)
    for level in reversed(range(weights.shape[1])):
        x, y = places[:, level].flatten(0, 1).unbind(-1)
        share = relative[:, level].flatten().numpy()
        colors = to_rgba_array([LEVEL_COLORS[level % len(LEVEL_COLORS)]] * len(share), 0.15 + 0.7 * share)
        axis.scatter(x.numpy(), y.numpy(), s=4 + LARGEST_POINT * share, c=colors, edgecolors=OUTLINE, linewidths=0.4)
