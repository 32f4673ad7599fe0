"""Draw the anchors of the best queries layer by layer: where they start, and what every decoder layer makes of them.

Example::

    python -m tools.visualize anchors outputs/demo/checkpoint.pth picture.jpg --output anchors.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tools.detector import Detector, load_detector

from .capture import trace_layers
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
    write_text,
)

MOST_COLUMNS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    add_query_arguments(parser, count=6)


def run(options: argparse.Namespace, model_options: Sequence[str]) -> None:
    """Draw what the command line asks for."""
    detector = load_detector(options.checkpoint, options=model_options)
    picture = read_picture(options.image)
    draw_anchors(detector, picture, options.output, count=options.count, queries=options.queries)


def draw_anchors(
    detector: Detector, picture: Image.Image, out_path: Path, *, count: int = 6, queries: Sequence[int] | None = None
) -> list[int]:
    """Draw one panel with the initial anchors and one per decoder layer, a query always in the same colour.

    A layer's panel shows the predicted boxes and, dashed, the anchors the layer started from.

    Args:
        picture: RGB; out_path: PNG or SVG.
        count: queries drawn, best first; queries: draw these instead.

    Returns:
        The queries drawn.

    Raises:
        OptionError: there is no such query.
    """
    image, _ = prepare(detector, picture)
    trace = trace_layers(detector.model, image)
    chosen = choose_queries(trace.probabilities[-1], queries, count)
    layers = len(trace.boxes)
    columns = min(layers + 1, MOST_COLUMNS)
    figure, axes = make_panels(math.ceil((layers + 1) / columns), columns, picture)
    for axis in axes.flat[layers + 1 :]:
        axis.set_axis_off()
    is_box = trace.references[0].shape[-1] == 4
    for panel, axis in enumerate(axes.flat[: layers + 1]):
        show_picture(axis, picture)
        axis.set_title(f"after layer {panel}" if panel else ("initial anchors" if is_box else "initial points"))
        for number, query in enumerate(chosen):
            color = color_of(number)
            if panel == 0:
                place = draw_reference(axis, trace.references[0][query], picture, color)
                write_text(axis, place, str(query), color, picture)
                continue
            draw_reference(axis, trace.references[panel - 1][query], picture, color, style=":", width=1.0)
            place = draw_reference(axis, trace.boxes[panel - 1, query], picture, color)
            if panel == layers:
                text = f"{query}: " + describe(trace.probabilities[-1, query], detector.class_names)
                write_text(axis, place, text, color, picture)
    save(figure, out_path)
    return chosen
