"""Rendered scenes of textured, overlapping, rotated shapes on cluttered backgrounds, with exact annotations.

Shapes are cut out on a grid three times finer than the picture: edges are smooth, and boxes, areas and masks of the
visible part of a shape are exact to a third of a pixel. As with real objects, colour is a hint and form decides: three
of four shapes wear the usual hue of their class, the others any. Textures say nothing about the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .textures import contrasting_colours, paint_background, texture

Points = NDArray[np.float64]

SCENE_SIZE = 128
# Ids with gaps, as COCO's.
SHAPE_CATEGORIES = {2: "disc", 3: "triangle", 5: "bar", 8: "star", 11: "cross", 17: "ring"}
_FINE = 3
_SMALLEST, _LARGEST = 44.0, 140.0
_SHARE_EMPTY, _SHARE_WITH_CROWD = 0.03, 0.06
# Of the shape itself inside the picture, and of a shape not hidden by later ones: less cannot be told by eye.
_MIN_INSIDE, _MIN_VISIBLE = 0.6, 0.55
_PLACEMENT_TRIES = 25
_SHARE_USUAL_HUE, _HUE_SPREAD = 0.75, 0.04


@dataclass(frozen=True)
class _Stencil:
    """A shape (or a crowd of shapes) cut out on the fine grid.

    Attributes:
        category: category id.
        top, left: corner of the patch in picture pixels.
        mask: (3 h, 3 w) bool patch on the fine grid, cut at the picture's border.
        outline: (N, 2) x, y in pixels, or None when no single polygon describes the shape.
        is_crowd: many shapes annotated as one region.
    """

    category: int
    top: int
    left: int
    mask: NDArray[np.bool_]
    outline: Points | None
    is_crowd: bool

    def fine_window(self) -> tuple[slice, slice]:
        """Rows and columns of the patch on the fine grid."""
        top, left = self.top * _FINE, self.left * _FINE
        return slice(top, top + self.mask.shape[0]), slice(left, left + self.mask.shape[1])


def render_scene(rng: Generator) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Render one picture.

    Args:
        rng: source of everything random.

    Returns:
        (128 x 128 RGB picture, COCO annotations without ids: category_id, bbox, area, iscrowd, segmentation).
    """
    canvas = paint_background(rng, SCENE_SIZE)
    stencils, owner = _arrange(rng)
    for stencil in stencils:
        _paint(rng, canvas, stencil)
    canvas += rng.normal(0, rng.uniform(0.005, 0.025), canvas.shape).astype(np.float32)
    picture = Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    annotations = [_annotate(stencil, owner == number) for number, stencil in enumerate(stencils, start=1)]
    return picture, annotations


def _arrange(rng: Generator) -> tuple[list[_Stencil], NDArray[np.uint8]]:
    """Place shapes from back to front; return them and, per fine pixel, the number (from 1) of the one in front."""
    owner = np.zeros((SCENE_SIZE * _FINE,) * 2, dtype=np.uint8)
    stencils: list[_Stencil] = []
    total: list[int] = []
    if rng.random() < _SHARE_EMPTY:
        return stencils, owner
    count = int(rng.choice(6, p=[0.25, 0.3, 0.22, 0.12, 0.07, 0.04])) + 1
    diameters = np.exp(rng.uniform(math.log(_SMALLEST), math.log(_LARGEST), size=count))
    # Large ones tend to the back, but not strictly.
    diameters = diameters[np.argsort(-diameters * rng.uniform(0.6, 1.4, size=count))]
    sizes: list[float | None] = list(diameters.tolist())
    if rng.random() < _SHARE_WITH_CROWD:
        sizes.insert(0, None)
    for diameter in sizes:
        # Drawn once: drawn again with every try, shapes that hide much would be rarer.
        category = int(rng.choice(list(SHAPE_CATEGORIES)))
        for _ in range(_PLACEMENT_TRIES):
            stencil = _cut_crowd(rng, category) if diameter is None else _cut_shape(rng, category, diameter)
            if stencil is None:
                continue
            patch = owner[stencil.fine_window()]
            hidden = np.bincount(patch[stencil.mask], minlength=len(total) + 1)[1:]
            visible = np.bincount(owner.ravel(), minlength=len(total) + 1)[1:] - hidden
            if (visible >= _MIN_VISIBLE * np.array(total)).all():
                stencils.append(stencil)
                total.append(int(stencil.mask.sum()))
                patch[stencil.mask] = len(total)
                break
    return stencils, owner


def _unit_outline(name: str) -> Points:
    """Corners of a shape of radius 1, (N, 2)."""
    if name in ("disc", "ring"):
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return np.stack((np.cos(angles), np.sin(angles)), axis=1)
    if name == "triangle":
        angles = math.pi * np.array([0, 2, 4]) / 3
        return np.stack((np.cos(angles), np.sin(angles)), axis=1)
    if name == "bar":
        return np.array([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])
    if name == "star":
        angles = math.pi * np.arange(10) / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return np.stack((radii * np.cos(angles), radii * np.sin(angles)), axis=1)
    # The cross: one arm's corners, turned by a right angle three times.
    quarter = np.array([(0.27, 0.27), (0.27, 1), (-0.27, 1)])
    corners = [quarter]
    for _ in range(3):
        corners.append(np.stack((-corners[-1][:, 1], corners[-1][:, 0]), axis=1))
    return np.concatenate(corners)


def _cut_shape(rng: Generator, category: int, diameter: float) -> _Stencil | None:
    """Cut a shape at a random place, or None when too much of it would lie outside the picture."""
    # The larger, the nearer to the middle: whole enough, and some of COCO's "large" areas among them.
    margin = min(0.35 * diameter, 0.45 * SCENE_SIZE)
    centre = rng.uniform(margin, SCENE_SIZE - margin, size=2)
    outline = _transformed(rng, _unit_outline(SHAPE_CATEGORIES[category]), diameter, centre)
    hole = _hole(category, outline)
    low, high = np.floor(outline.min(axis=0)).astype(int), np.ceil(outline.max(axis=0)).astype(int)
    mask = _fill([(outline, hole)], low, high)
    low_in, high_in = low.clip(0, SCENE_SIZE), high.clip(0, SCENE_SIZE)
    (x0, y0), (x1, y1) = (low_in - low) * _FINE, (high_in - low) * _FINE
    inside = mask[y0:y1, x0:x1]
    if inside.sum() < _MIN_INSIDE * mask.sum():
        return None
    whole = hole is None and inside.shape == mask.shape
    return _Stencil(category, int(low_in[1]), int(low_in[0]), inside, outline if whole else None, is_crowd=False)


def _cut_crowd(rng: Generator, category: int) -> _Stencil:
    """Cut a crowd: many small shapes of one class close together, wholly inside the picture."""
    extent = rng.uniform(34, 60, size=2)
    corner = rng.uniform(8, SCENE_SIZE - 8 - extent)
    unit = _unit_outline(SHAPE_CATEGORIES[category])
    outlines = [
        _transformed(rng, unit, rng.uniform(9, 14), corner + rng.uniform(0, 1, size=2) * extent)
        for _ in range(int(rng.integers(14, 24)))
    ]
    points = np.concatenate(outlines)
    low = np.floor(points.min(axis=0)).astype(int).clip(0, SCENE_SIZE)
    high = np.ceil(points.max(axis=0)).astype(int).clip(0, SCENE_SIZE)
    mask = _fill([(outline, _hole(category, outline)) for outline in outlines], low, high)
    return _Stencil(category, int(low[1]), int(low[0]), mask, None, is_crowd=True)


def _hole(category: int, outline: Points) -> Points | None:
    """Outline of a ring's hole; no other shape has one."""
    if SHAPE_CATEGORIES[category] != "ring":
        return None
    centre = outline.mean(axis=0)
    result: Points = centre + 0.55 * (outline - centre)
    return result


def _transformed(rng: Generator, unit: Points, diameter: float, centre: Points) -> Points:
    """Stretch a little, rotate, scale and move an outline."""
    angle = rng.uniform(0, 2 * math.pi)
    rotation = np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))])
    return (unit * rng.uniform(0.85, 1.0, size=2)) @ rotation.T * (diameter / 2) + centre


def _fill(
    shapes: list[tuple[Points, Points | None]], low: NDArray[np.int64], high: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Fill (outline, hole or None) pairs on the fine grid of the window between two corners (x, y), in pixels."""
    stencil = Image.new("1", tuple(((high - low) * _FINE).tolist()))
    draw = ImageDraw.Draw(stencil)
    for outline, hole in shapes:
        for points, value in ((outline, 1), (hole, 0)):
            if points is not None:
                # PIL takes whole coordinates for pixel centres; -0.5 puts the centres at half pixels.
                draw.polygon([tuple(point) for point in ((points - low) * _FINE - 0.5).tolist()], fill=value)
    return np.array(stencil)


def _paint(rng: Generator, canvas: NDArray[np.float32], stencil: _Stencil) -> None:
    """Blend a textured shape into the canvas, in place."""
    height, width = (side // _FINE for side in stencil.mask.shape)
    alpha = stencil.mask.reshape(height, _FINE, width, _FINE).mean(axis=(1, 3), dtype=np.float32)[..., None]
    patch = canvas[stencil.top : stencil.top + height, stencil.left : stencil.left + width]
    behind = (patch * alpha).sum(axis=(0, 1)) / max(float(alpha.sum()), 1e-6)
    first, second = contrasting_colours(rng, behind, _hue(rng, stencil.category))
    weight = texture(rng, height, width)[..., None]
    patch += alpha * (first + (second - first) * weight - patch)


def _hue(rng: Generator, category: int) -> float:
    """Draw a hue in turns: most shapes have one near the usual hue of their class."""
    usual = list(SHAPE_CATEGORIES).index(category) / len(SHAPE_CATEGORIES)
    is_usual = rng.random() < _SHARE_USUAL_HUE
    return rng.normal(usual, _HUE_SPREAD) if is_usual else rng.uniform(0, 1)


def _annotate(stencil: _Stencil, visible: NDArray[np.bool_]) -> dict[str, Any]:
    """Describe the visible part, (384, 384) on the fine grid, as COCO does."""
    area = int(visible.sum())
    is_hidden = area < stencil.mask.sum()
    coarse = visible.reshape(SCENE_SIZE, _FINE, SCENE_SIZE, _FINE).mean(axis=(1, 3)) >= 0.5
    segmentation: Any = {"size": [SCENE_SIZE, SCENE_SIZE], "counts": _run_lengths(coarse)}
    if stencil.outline is not None and not is_hidden:
        segmentation = [stencil.outline.round(2).ravel().tolist()]
    # A sliver of less than half a pixel beside the shape in front cannot be seen: it must not stretch the box.
    seen = visible & coarse.repeat(_FINE, axis=0).repeat(_FINE, axis=1) if is_hidden else visible
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    box = (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)
    return {
        "category_id": stencil.category,
        "bbox": [round(value / _FINE, 2) for value in box],
        "area": round(area / _FINE**2, 2),
        "iscrowd": int(stencil.is_crowd),
        "segmentation": segmentation,
    }


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs down the columns, background first, as COCO's uncompressed masks."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return [0, *lengths] if flat[0] else lengths
