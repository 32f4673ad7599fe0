"""From the bytes of a file to augmented pixels: exactly as Pillow does it, or with torch in a fraction of the time.

Both take the same decisions (`Augmentation`), so the objects of a picture do not depend on which one renders it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from .images import decode_image
from .jpeg import read_frame


class Augmentation(NamedTuple):
    """Everything that is done to one picture, in this order.

    Attributes:
        flip: mirror left to right.
        before_crop_hw: size to resize to before the crop; None: no crop.
        window: (top, left, height, width) of the crop in pixels of that size; None: no crop.
        size_hw: size of the outcome.
    """

    flip: bool
    before_crop_hw: tuple[int, int] | None
    window: tuple[int, int, int, int] | None
    size_hw: tuple[int, int]


class Renderer(NamedTuple):
    """One way from bytes to pixels.

    Attributes:
        decode: file content -> picture, RGB; raises `DatasetError` for what is no picture.
        size_wh: picture -> width, height.
        render: picture, plan -> (3, H, W) uint8.
    """

    decode: Callable[[bytes], Any]
    size_wh: Callable[[Any], tuple[int, int]]
    render: Callable[[Any, Augmentation], Tensor]


def to_pixels(image: Image.Image) -> Tensor:
    """Turn an RGB picture into a (3, H, W) uint8 tensor, in memory as (H, W, 3)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def render_picture(image: Image.Image, plan: Augmentation) -> Tensor:
    """Flip, resize, crop and resize one after the other with Pillow, bit for bit as the official code."""
    if plan.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan.before_crop_hw is not None and plan.window is not None:
        top, left, height, width = plan.window
        image = image.resize(plan.before_crop_hw[::-1], Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + width, top + height))
    return to_pixels(image.resize(plan.size_hw[::-1], Image.Resampling.BILINEAR))


def decode_pixels(encoded: bytes) -> Tensor:
    """Decode a picture into (3, H, W) uint8, to the same values as `decode_image`.

    Raises:
        DatasetError: as `decode_image`.
    """
    if _is_plain_jpeg(encoded):
        # Pillow decides what is a damaged file, and words the complaint.
        with contextlib.suppress(RuntimeError):
            return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    return to_pixels(decode_image(encoded))


def _is_plain_jpeg(encoded: bytes) -> bool:
    """Tell whether torchvision gives the values of Pillow: for gray and colour JPEGs of a size that Pillow accepts."""
    frame = read_frame(encoded)
    if frame is None or frame.bits != 8 or frame.components not in (1, 3):
        return False
    return 0 < frame.height * frame.width <= (Image.MAX_IMAGE_PIXELS or math.inf)


def render_pixels(pixels: Tensor, plan: Augmentation) -> Tensor:
    """Cut what is needed out of the stored picture, mirror it and resize it once.

    The window of the crop lies where it should to within a pixel of the outcome, because it is cut at whole pixels;
    without a crop values differ from Pillow's by one level of 255 at most.
    """
    if plan.before_crop_hw is None or plan.window is None:
        return _resize(pixels.flip(-1) if plan.flip else pixels, plan.size_hw)
    top, left, height, width = plan.window
    rows = _Span.cut(pixels.shape[1], plan.before_crop_hw[0], top, height, plan.size_hw[0])
    columns = _Span.cut(pixels.shape[2], plan.before_crop_hw[1], left, width, plan.size_hw[1])
    first, last = columns.first, columns.last
    if plan.flip:
        # The window was drawn in the mirrored picture.
        first, last = pixels.shape[2] - last, pixels.shape[2] - first
    part = pixels[:, rows.first : rows.last, first:last]
    resized = _resize(part.flip(-1) if plan.flip else part, (rows.resized, columns.resized))
    return resized[
        :, rows.skipped : rows.skipped + plan.size_hw[0], columns.skipped : columns.skipped + plan.size_hw[1]
    ]


class _Span(NamedTuple):
    """One axis of a crop: stored pixels `first` to `last` become `resized` ones, of which `skipped` go first."""

    first: int
    last: int
    resized: int
    skipped: int

    @classmethod
    def cut(cls, stored: int, before_crop: int, start: int, length: int, wanted: int) -> _Span:
        """Find the span of a window from `start`, `length` long, in an axis resized from `stored` to `before_crop`."""
        first, last = start * stored // before_crop, math.ceil((start + length) * stored / before_crop)
        factor = wanted / length * before_crop / stored
        resized = max(round((last - first) * factor), wanted)
        skipped = round((start * stored / before_crop - first) * factor)
        return cls(first, last, resized, min(skipped, resized - wanted))


def _resize(pixels: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[1:]) == size_hw:
        return pixels
    # A batch of one whose strides torch takes for channels last: it then neither unpacks nor repacks the colours.
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return interpolate(batch, size=size_hw, mode="bilinear", antialias=True)[0]


def _picture_size(image: Image.Image) -> tuple[int, int]:
    return image.size


def _pixels_size(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[2], pixels.shape[1]


# --image_backend -> how pictures are read.
RENDERERS = {
    "pil": Renderer(decode_image, _picture_size, render_picture),
    "torch": Renderer(decode_pixels, _pixels_size, render_pixels),
}
