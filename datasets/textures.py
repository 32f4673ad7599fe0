"""Backgrounds, textures and colours of rendered scenes."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.float32]


def paint_background(rng: Generator, size: int) -> Floats:
    """Paint a (size, size, 3) background in [0, 1]: a soft gradient, cloudy patches, blobs, lines and arcs."""
    first, second = _muted_colour(rng), _muted_colour(rng)
    weight = 0.6 * _gradient(rng, size, size) + 0.4 * _clouds(rng, size, size)
    canvas = first + (second - first) * weight[..., None]
    canvas += rng.uniform(0.05, 0.2) * (_clouds(rng, size, size)[..., None] - 0.5)
    picture = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8)).resize((2 * size, 2 * size))
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(int(rng.integers(6, 18))):
        _draw_clutter(rng, draw, 2 * size)
    return np.asarray(picture.reduce(2), dtype=np.float32) / np.float32(255)


def texture(rng: Generator, height: int, width: int) -> Floats:
    """Weights in [0, 1] of a second colour, (height, width): one of seven patterns."""
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))]
    return pattern(rng, height, width)


def contrasting_colours(rng: Generator, behind: Floats, hue: float) -> tuple[Floats, Floats]:
    """Draw two related colours, (3,) each in [0, 1], both at some distance from the colour behind them.

    Args:
        rng: source of everything random.
        behind: (3,) mean colour of the picture where the shape will be.
        hue: of the first colour, in turns; the second is at most a thirtieth of a turn away.
    """
    while True:
        saturation, value = rng.uniform(0.4, 1), rng.uniform(0.3, 1)
        other_value = value + rng.uniform(0.12, 0.3) * (1 if value < 0.6 else -1)
        first = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)
        second_hue = (hue + rng.uniform(-1, 1) / 30) % 1
        second = np.array(colorsys.hsv_to_rgb(second_hue, saturation, other_value), dtype=np.float32)
        if min(np.abs(first - behind).max(), np.abs(second - behind).max()) > 0.22:
            return first, second


def _muted_colour(rng: Generator) -> Floats:
    return np.array(
        colorsys.hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0, 0.45), rng.uniform(0.15, 0.9)), dtype=np.float32
    )


def _draw_clutter(rng: Generator, draw: ImageDraw.ImageDraw, size: int) -> None:
    """Draw one thing that is none of the classes: a line, an open arc or a faint lump."""
    colour = (*(int(v) for v in rng.integers(0, 256, size=3)), int(rng.integers(60, 170)))
    kind = int(rng.integers(3))
    x, y = rng.uniform(0, size, size=2)
    if kind == 0:
        points = np.cumsum(np.concatenate(([(x, y)], rng.normal(0, size / 7, size=(3, 2)))), axis=0)
        draw.line([tuple(point) for point in points.tolist()], fill=colour, width=int(rng.integers(1, 4)))
    elif kind == 1:
        radius, start = rng.uniform(size / 20, size / 4), rng.uniform(0, 360)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.arc(box, start, start + rng.uniform(40, 160), fill=colour, width=int(rng.integers(1, 4)))
    else:
        angles = np.sort(rng.uniform(0, 2 * math.pi, size=9))
        radii = rng.uniform(0.4, 1.0, size=9) * rng.uniform(size / 30, size / 8)
        points = np.stack((x + radii * np.cos(angles), y + radii * np.sin(angles)), axis=1)
        draw.polygon([tuple(point) for point in points.tolist()], fill=(*colour[:3], colour[3] // 3))


def _phase(rng: Generator, height: int, width: int, period: float) -> Floats:
    """Position along a random direction, in radians with the given period in pixels, (height, width)."""
    angle = rng.uniform(0, math.pi)
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    along = rows * math.sin(angle) + columns * math.cos(angle)
    return along * np.float32(2 * math.pi / period) + np.float32(rng.uniform(0, 2 * math.pi))


def _plain(rng: Generator, height: int, width: int) -> Floats:
    return np.full((height, width), rng.uniform(0, 0.3), dtype=np.float32)


def _gradient(rng: Generator, height: int, width: int) -> Floats:
    ramp = _phase(rng, height, width, 1.0)
    ramp -= ramp.min()
    return ramp / max(float(ramp.max()), 1e-6)


def _stripes(rng: Generator, height: int, width: int) -> Floats:
    return (0.5 + 0.5 * np.sin(_phase(rng, height, width, rng.uniform(4, 12)))).astype(np.float32)


def _checks(rng: Generator, height: int, width: int) -> Floats:
    period = rng.uniform(6, 14)
    product = np.sin(_phase(rng, height, width, period)) * np.sin(_phase(rng, height, width, period))
    return (product > 0).astype(np.float32)


def _dots(rng: Generator, height: int, width: int) -> Floats:
    period = rng.uniform(5, 10)
    product = np.sin(_phase(rng, height, width, period)) * np.sin(_phase(rng, height, width, period))
    return (np.abs(product) > 0.5).astype(np.float32)


def _clouds(rng: Generator, height: int, width: int) -> Floats:
    cells = int(rng.integers(3, 8))
    coarse = Image.fromarray(rng.uniform(0, 1, size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def _grain(rng: Generator, height: int, width: int) -> Floats:
    return rng.uniform(0, 1, size=(height, width)).astype(np.float32)


_PATTERNS: tuple[Callable[[Generator, int, int], Floats], ...] = (
    _plain,
    _gradient,
    _stripes,
    _checks,
    _dots,
    _clouds,
    _grain,
)
