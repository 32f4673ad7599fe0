"""What all pictures share: reading the input, choosing queries, panels, boxes, texts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from torch import Tensor

from datasets import DatasetError
from datasets.annotations import Target, make_target, read_objects
from datasets.images import decode_image
from datasets.transforms import EvalTransform
from tools.detector import Detector
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import OptionError
from util.plots import COLORS

PANEL_INCHES = 3.0
SUFFIXES = (".png", ".svg")
# Height of a line of text and width of a character, relative to the width of a panel.
LINE, CHARACTER = 0.055, 0.021


def output_path(text: str) -> Path:
    """Return the picture to write, checked: a PNG or SVG in a folder that exists."""
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png or .svg, got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {path.parent}: make it first")
    return path


def positive(text: str) -> int:
    """Return a number of things to draw, checked: at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number


def add_query_arguments(parser: argparse.ArgumentParser, *, count: int) -> None:
    """Add the picture to look at and which queries are drawn, `count` of them unless told otherwise."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="picture to look at")
    parser.add_argument("--count", type=positive, default=count, help="draw so many queries with the highest scores")
    parser.add_argument("--queries", type=int, nargs="+", metavar="N", help="draw these queries instead")


def read_picture(path: Path) -> Image.Image:
    """Return the RGB picture of a file.

    Raises:
        DatasetError: it is missing or unreadable.
    """
    try:
        return decode_image(path.read_bytes())
    except (OSError, DatasetError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DatasetError(f"cannot read the picture {path}: {reason}") from error


def prepare(
    detector: Detector, picture: Image.Image, annotations: Sequence[dict[str, Any]] = ()
) -> tuple[Tensor, Target]:
    """Bring a picture into the form the detector evaluates pictures in.

    Args:
        annotations: COCO's entries for this picture, `category_id` already a label.

    Returns:
        image (3, H, W) on the model's device, and the target on it: `labels`, `boxes` cxcywh in [0, 1].
    """
    target = make_target(read_objects(annotations), image_id=0, width=picture.width, height=picture.height)
    transform = EvalTransform(scale=detector.args.eval_scale, max_size=detector.args.data_aug_max_size)
    image, target = transform(picture, target)
    device = next(detector.model.parameters()).device
    return image.to(device), {name: value.to(device) for name, value in target.items()}


def choose_queries(probabilities: Tensor, queries: Sequence[int] | None, count: int) -> list[int]:
    """Return the queries to draw: those asked for, else the `count` with the highest score.

    Args:
        probabilities: (Q, K) of the last layer.

    Raises:
        OptionError: there is no such query.
    """
    if queries:
        unknown = [query for query in queries if not 0 <= query < len(probabilities)]
        if unknown:
            raise OptionError(f"expected --queries from 0 to {len(probabilities) - 1}, got {unknown[0]}")
        return list(queries)
    scores = probabilities.max(-1).values
    return scores.topk(min(count, len(scores))).indices.tolist()


def color_of(number: int) -> str:
    """Return the colour of the number-th thing in a picture."""
    return COLORS[number % len(COLORS)]


def describe(probabilities: Tensor, class_names: Sequence[str]) -> str:
    """Return the best class of (K,) probabilities and its score, as "cat 0.87"."""
    score, label = probabilities.max(-1)
    return f"{class_names[int(label)]} {score:.2f}"


def make_panels(rows: int, columns: int, picture: Image.Image) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Return a figure and its (rows, columns) axes, without ticks, in the shape of the picture."""
    height = PANEL_INCHES * min(picture.height / picture.width, 2.0)
    figure = Figure(figsize=(PANEL_INCHES * columns, (height + 0.3) * rows + 0.4), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def show_picture(axis: Axes, picture: Image.Image, *, faded: bool = False) -> None:
    """Fill an axis with the picture, pixel coordinates; faded is pale and without colour, to draw on."""
    pixels = np.asarray(picture)
    if faded:
        gray = np.asarray(ImageOps.autocontrast(picture.convert("L"), cutoff=1), dtype=np.float32)
        pixels = np.repeat((100 + gray * 0.6).astype(np.uint8)[..., None], 3, axis=-1)
    axis.imshow(pixels, extent=(0, picture.width, picture.height, 0))
    axis.set_xlim(0, picture.width)
    axis.set_ylim(picture.height, 0)


def draw_reference(
    axis: Axes, reference: Tensor, picture: Image.Image, color: str, *, style: str = "-", width: float = 1.6
) -> tuple[float, float]:
    """Draw a box (4,) cxcywh, or a point (2,), in [0, 1]; return the pixel of its upper left corner."""
    scale = torch.tensor([picture.width, picture.height], dtype=torch.float32)
    if len(reference) == 2:
        x, y = (reference * scale).tolist()
        axis.plot([x], [y], "+", color=color, markersize=10, markeredgewidth=width + 0.6)
        return x, y
    left, top, right, bottom = (box_cxcywh_to_xyxy(reference) * scale.repeat(2)).tolist()
    look: dict[str, Any] = {"fill": False, "edgecolor": color, "linewidth": width, "linestyle": style}
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, **look))
    return left, top


def write_text(axis: Axes, place: tuple[float, float], text: str, color: str, picture: Image.Image) -> None:
    """Write a text on its colour at a pixel, inside the picture and below texts that are there already."""
    line, width = LINE * picture.width, CHARACTER * picture.width * len(text)
    x = min(max(place[0], 0), max(picture.width - width, 0))
    y = min(max(place[1] - line, 0), picture.height - line)
    taken = [(*other.get_position(), CHARACTER * picture.width * len(other.get_text())) for other in axis.texts]
    while any(abs(y - top) < line and x < left + long and left < x + width for left, top, long in taken):
        y += line / 4
    box = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    axis.text(x, y, text, fontsize=7, color="black", verticalalignment="top", bbox=box)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as its suffix says, without empty borders."""
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05)
