"""Check the boxes of an annotation file against the sizes of their pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.data.check_entries import SplitContent, is_integer
from tools.data.kinds import Problem

# Annotation tools round corners; what reaches over by less is no mistake worth a line.
EDGE_TOLERANCE = 1.0
# Shares of a file's boxes from which on the format, not the single box, is to blame.
_CORNER_SHARE = 0.2


def check_boxes(content: SplitContent) -> list[Problem]:
    """Return the problems of all boxes of one annotation file."""
    problems: list[Problem] = []
    positions = []
    for position, annotation in enumerate(content.annotations):
        kind, detail = _fault(annotation)
        if kind:
            problems.append(content.annotation_problem(kind, position, detail))
        else:
            positions.append(position)
    boxes = np.array([content.annotations[p]["bbox"] for p in positions], dtype=np.float64).reshape(-1, 4)
    sizes_wh = np.array([_picture_size(content, p) for p in positions], dtype=np.float64).reshape(-1, 2)
    problems += _check_format(content, boxes, sizes_wh)
    for place in np.flatnonzero(~(boxes[:, 2:] > 0).all(1)):
        detail = f"bbox {_text(boxes[place])}: width and height must be above 0"
        problems.append(content.annotation_problem("empty_box", positions[place], detail))
    problems += _check_place(content, positions, boxes, sizes_wh)
    problems += _check_area(content, positions, boxes)
    problems += _find_repeated(content, positions)
    return problems


def _fault(annotation: dict[str, Any]) -> tuple[str, str]:
    box = annotation.get("bbox")
    if box is None or box == []:
        if annotation.get("segmentation"):
            return "segmentation_only", "there is no bbox"
        return "malformed_box", "there is no bbox"
    if not isinstance(box, list) or len(box) != 4:
        return "malformed_box", f"bbox is {_shorten(box)}"
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        return "malformed_box", f"bbox is {_shorten(box)}"
    return "", ""


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _picture_size(content: SplitContent, position: int) -> tuple[float, float]:
    image_id = content.annotations[position].get("image_id")
    picture = content.pictures.get(image_id) if is_integer(image_id) else None
    if picture is not None and not picture.fault:
        return picture.width, picture.height
    entry = content.images.get(image_id, {}) if is_integer(image_id) else {}
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if is_integer(width) and is_integer(height) else (math.inf, math.inf)


def _check_format(
    content: SplitContent, boxes: NDArray[np.float64], sizes_wh: NDArray[np.float64]
) -> Iterator[Problem]:
    if not len(boxes):
        return
    if (boxes <= 1).all() and (sizes_wh > 2).all():
        detail = f"no number of {len(boxes)} boxes is above 1, such as {_text(boxes[0])}"
        yield Problem("normalised_boxes", content.file, "list 'annotations'", detail)
        return
    right_bottom = boxes[:, :2] + boxes[:, 2:]
    over = (right_bottom > sizes_wh + EDGE_TOLERANCE).any(1)
    fits_as_corners = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] <= sizes_wh + EDGE_TOLERANCE).all(1)
    if over.mean() > _CORNER_SHARE and fits_as_corners.all():
        detail = (
            f"{over.sum()} of {len(boxes)} boxes reach over the edge, and all fit when read as left, top, right, bottom"
        )
        yield Problem("corner_boxes", content.file, "list 'annotations'", detail)


def _check_place(
    content: SplitContent, positions: list[int], boxes: NDArray[np.float64], sizes_wh: NDArray[np.float64]
) -> Iterator[Problem]:
    left_top, right_bottom = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    has_area = (boxes[:, 2:] > 0).all(1)
    outside = np.logical_and(has_area, np.any((right_bottom <= 0) | (left_top >= sizes_wh), axis=1))
    excess = np.maximum(-left_top, right_bottom - sizes_wh).max(1, initial=0)
    for place in np.flatnonzero(outside | (has_area & (excess > EDGE_TOLERANCE))):
        width, height = sizes_wh[place]
        where = f"bbox {_text(boxes[place])} in a picture of {width:g} x {height:g}"
        if outside[place]:
            yield content.annotation_problem("outside_box", positions[place], where)
        else:
            detail = f"{where}: {excess[place]:.4g} pixels over"
            yield content.annotation_problem("over_edge", positions[place], detail)
    for place in np.flatnonzero(has_area & (boxes[:, 2:] < 1).any(1)):
        yield content.annotation_problem("tiny_box", positions[place], f"bbox {_text(boxes[place])}")


def _check_area(content: SplitContent, positions: list[int], boxes: NDArray[np.float64]) -> Iterator[Problem]:
    for position, (_, _, width, height) in zip(positions, boxes.tolist(), strict=True):
        area = content.annotations[position].get("area")
        if area is None:
            yield content.annotation_problem("area", position, "there is no area")
        elif not isinstance(area, (int, float)) or not math.isfinite(area):
            yield content.annotation_problem("malformed_entry", position, f"area is a number, found {_shorten(area)}")
        # Masks drawn along pixel borders may exceed their box by a rim.
        elif width > 0 and height > 0 and area > (width + 1) * (height + 1):
            yield content.annotation_problem("area", position, f"area {area:g}, box {width:g} x {height:g}")


def _find_repeated(content: SplitContent, positions: list[int]) -> Iterator[Problem]:
    seen: dict[tuple[Any, ...], int] = {}
    for position in positions:
        annotation = content.annotations[position]
        if is_integer(annotation.get("image_id")) and is_integer(annotation.get("category_id")):
            key = (annotation["image_id"], annotation["category_id"], *annotation["bbox"])
            first = seen.setdefault(key, position)
            if first != position:
                detail = f"same image, category and box as {content.name_annotation(first).partition(',')[0]}"
                yield content.annotation_problem("duplicate_object", position, detail)


def _text(box: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{value:.6g}' for value in box)}]"
