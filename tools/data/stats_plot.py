"""The picture of a data set's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from util.plots import COLORS

_SPLIT_COLORS = (COLORS[4], COLORS[0])
_MOST_CLASSES = 25
_BINS = 40


class Columns(Protocol):
    """What of `stats.Counts` is drawn."""

    name: str
    objects_per_image: NDArray[np.int64]
    picture_wh: NDArray[np.float64]
    box_wh: NDArray[np.float64]
    category: NDArray[np.int64]
    scale: NDArray[np.float64]
    class_names: dict[int, str]


def plot_stats(counts: Sequence[Columns], path: Path, *, num_queries: int, scale: int) -> None:
    """Draw objects per picture, box sides, classes, aspect ratios and picture sizes, one colour per split.

    Shares of each split are drawn, so that a small split can be compared with a large one.

    Args:
        counts: one or two splits; path: where the picture goes, its suffix says the format.
        num_queries: drawn where it lies within reach; scale: short side after the resize.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _objects_per_picture(axes[0, 0], counts, num_queries)
    _box_sides(axes[0, 1], counts, scale)
    ratios = [split.box_wh[:, 0] / split.box_wh[:, 1] for split in counts]
    _histogram(axes[0, 2], counts, ratios, _log_edges(ratios), "width / height of boxes")
    _log_ticks(axes[0, 2], (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8))
    _classes(axes[1, 0], counts)
    _picture_sizes(axes[1, 1], counts)
    axes[1, 2].axis("off")
    lines = [_summary(split) for split in counts]
    axes[1, 2].text(0, 1, "\n\n".join(lines), va="top", fontsize=11, linespacing=1.5)
    figure.savefig(path, dpi=100)


def _objects_per_picture(axis: Axes, counts: Sequence[Columns], num_queries: int) -> None:
    most = max(int(split.objects_per_image.max(initial=0)) for split in counts)
    step = max(1, -(-(most + 1) // _BINS))
    edges = np.arange(0, most + step + 1, step) - 0.5
    _histogram(axis, counts, [split.objects_per_image for split in counts], edges, "objects per picture")
    # Far away, the line would squeeze everything else to the left.
    if num_queries <= 3 * max(most, 1):
        axis.axvline(num_queries, color=COLORS[5], linestyle="--", label=f"{num_queries} queries")
    else:
        axis.plot([], [], " ", label=f"most {most}, queries {num_queries}")
    axis.legend(fontsize="small")


def _box_sides(axis: Axes, counts: Sequence[Columns], scale: int) -> None:
    sides = [np.sqrt(split.box_wh.prod(1) * split.scale) for split in counts]
    _histogram(axis, counts, sides, _log_edges(sides), f"side of boxes at short side {scale} (dotted: 32, 96)")
    for border in (32, 96):
        axis.axvline(border, color="black", linestyle=":", linewidth=1)
    _log_ticks(axis, (4, 8, 16, 32, 64, 128, 256, 512, 1024))


def _classes(axis: Axes, counts: Sequence[Columns]) -> None:
    names = {c: name for split in counts for c, name in split.class_names.items()}
    numbers = {c: [int((split.category == c).sum()) for split in counts] for c in names}
    order = sorted(names, key=lambda c: numbers[c][0], reverse=True)
    drawn = order[:_MOST_CLASSES]
    height = 0.8 / len(counts)
    for place, (split, color) in enumerate(zip(counts, _SPLIT_COLORS, strict=False)):
        total = max(len(split.category), 1)
        shares = [numbers[c][place] / total for c in drawn]
        axis.barh(np.arange(len(drawn)) + (place - (len(counts) - 1) / 2) * height, shares, height, color=color)
    axis.set_yticks(range(len(drawn)), [f"{names[c]} {'/'.join(map(str, numbers[c]))}" for c in drawn])
    axis.tick_params(axis="y", labelsize=10 if len(drawn) <= 10 else 7)
    axis.invert_yaxis()
    rest = f", {len(drawn)} most frequent of {len(order)}" if len(order) > len(drawn) else ""
    axis.set_title(f"objects per class{rest}")
    axis.set_xlabel("share of the split's objects")


def _picture_sizes(axis: Axes, counts: Sequence[Columns]) -> None:
    for split, color in zip(counts, _SPLIT_COLORS, strict=False):
        sizes, number = np.unique(split.picture_wh, axis=0, return_counts=True)
        area = 20 + 400 * number / number.sum()
        axis.scatter(sizes[:, 0], sizes[:, 1], area, color=color, alpha=0.5, label=split.name)
    axis.set_title("picture sizes (dot area: share)")
    axis.set_xlabel("width")
    axis.set_ylabel("height")
    limit = 1.15 * max(split.picture_wh.max() for split in counts)
    axis.set_xlim(0, limit)
    axis.set_ylim(0, limit)
    axis.set_aspect("equal")
    axis.grid(alpha=0.3)


def _histogram(
    axis: Axes, counts: Sequence[Columns], values: Sequence[NDArray[Any]], edges: NDArray[Any], title: str
) -> None:
    for split, numbers, color in zip(counts, values, _SPLIT_COLORS, strict=False):
        share = np.full(len(numbers), 1 / max(len(numbers), 1))
        axis.hist(numbers, edges.tolist(), weights=share, color=color, alpha=0.55, label=split.name)
    axis.set_title(title)
    axis.set_ylabel("share")
    axis.margins(y=0.3)  # room for the legend
    axis.legend(fontsize="small")


def _log_edges(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    joined = np.concatenate([*values, [1.0]]) if not sum(map(len, values)) else np.concatenate(values)
    return np.geomspace(joined.min() / 1.05, joined.max() * 1.05, _BINS + 1)


def _log_ticks(axis: Axes, ticks: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}"))


def _summary(split: Columns) -> str:
    empty = int((split.objects_per_image == 0).sum())
    return (
        f"{split.name}: {len(split.objects_per_image)} pictures, {empty} without objects\n"
        f"{len(split.category)} objects of {len(np.unique(split.category))} classes\n"
        f"{split.objects_per_image.mean():.1f} per picture, at most {split.objects_per_image.max(initial=0)}"
    )
