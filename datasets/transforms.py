"""Train and evaluation transforms, pixel for pixel and random call for random call those of DETR and its descendants.

A target's ``boxes`` are xyxy in pixels until `to_model_input` makes them cxcywh relative to the image. Random numbers
come from the python ``random`` module (flip, branch, sizes) and, for the position of the crop window, from torch's
default generator, in the official order. Nothing here seeds them: `datasets.loader` does, per sample. What is drawn
depends on the size of the picture alone: drawing, pixels (`datasets.rendering`) and objects are three separate steps.
Objects are carried along as numpy arrays and become the tensors of a target at the end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.pixels import normalize_pixels

from .annotations import Arrays, DatasetError, Target, has_area, to_arrays, to_tensors
from .rendering import Augmentation, render_picture, to_pixels

TRAIN_SCALES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
MAX_SIZE = 1333
RESIZE_BEFORE_CROP = (400, 500, 600)
CROP_RANGE = (384, 600)


def resized_hw(width: int, height: int, size: int, max_size: int | None) -> tuple[int, int]:
    """Compute the size of an image whose short side becomes ``size``.

    Args:
        width, height: size now, in pixels.
        size: short side wanted.
        max_size: longest side allowed, or None.

    Returns:
        (height, width) afterwards; the long side is truncated to whole pixels.
    """
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    if short == size:
        return height, width
    stretched = int(size * long / short)
    return (stretched, size) if width < height else (size, stretched)


def hflip(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Mirror the image and its boxes left to right."""
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return mirrored, to_tensors(hflip_objects(to_arrays(target), image.width))


def hflip_objects(objects: Arrays, width: int) -> Arrays:
    """Mirror the boxes in a picture of this width."""
    boxes_xyxy = objects["boxes"].copy()
    boxes_xyxy[:, 0::2] = width - objects["boxes"][:, 2::-2]
    return objects | {"boxes": boxes_xyxy}


def resize(image: Image.Image, target: Target, size_hw: tuple[int, int]) -> tuple[Image.Image, Target]:
    """Resize the image bilinearly with antialiasing, its boxes and areas with it."""
    resized = image.resize(size_hw[::-1], Image.Resampling.BILINEAR)
    return resized, to_tensors(resize_objects(to_arrays(target), (image.height, image.width), size_hw))


def resize_objects(objects: Arrays, from_hw: tuple[int, int], size_hw: tuple[int, int]) -> Arrays:
    """Scale boxes and areas with a picture that is resized."""
    scale_y, scale_x = size_hw[0] / from_hw[0], size_hw[1] / from_hw[1]
    return objects | {
        "boxes": objects["boxes"] * np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32),
        "area": objects["area"] * np.float32(scale_x * scale_y),
        "size": np.array(size_hw),
    }


def crop(image: Image.Image, target: Target, window: tuple[int, int, int, int]) -> tuple[Image.Image, Target]:
    """Cut a window (top, left, height, width) out of the image, and see `crop_objects`."""
    top, left, height, width = window
    part = image.crop((left, top, left + width, top + height))
    return part, to_tensors(crop_objects(to_arrays(target), window))


def crop_objects(objects: Arrays, window: tuple[int, int, int, int]) -> Arrays:
    """Drop objects that lose their whole area; the others get the area of the box left.

    Args:
        objects: boxes xyxy in pixels.
        window: (top, left, height, width) in pixels.
    """
    top, left, height, width = window
    boxes_xyxy = objects["boxes"] - np.array([left, top, left, top], dtype=np.float32)
    boxes_xyxy = np.maximum(np.minimum(boxes_xyxy, np.array([width, height, width, height], dtype=np.float32)), 0)
    keep = has_area(boxes_xyxy)
    boxes_xyxy = boxes_xyxy[keep]
    return objects | {
        "boxes": boxes_xyxy,
        "area": (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1]),
        "labels": objects["labels"][keep],
        "iscrowd": objects["iscrowd"][keep],
        "size": np.array([height, width]),
    }


def augment_objects(objects: Arrays, plan: Augmentation, *, width: int, height: int) -> Arrays:
    """Carry the objects of a picture along with what is done to it.

    Args:
        objects: boxes xyxy in pixels.
        plan: what is done.
        width, height: size of the picture before.

    Returns:
        The objects with ``boxes`` cxcywh relative to the outcome.
    """
    size_hw = (height, width)
    if plan.flip:
        objects = hflip_objects(objects, width)
    if plan.before_crop_hw is not None and plan.window is not None:
        objects = crop_objects(resize_objects(objects, size_hw, plan.before_crop_hw), plan.window)
        size_hw = plan.window[2:]
    return relative_boxes(resize_objects(objects, size_hw, plan.size_hw), plan.size_hw)


def relative_boxes(objects: Arrays, size_hw: tuple[int, int]) -> Arrays:
    """Turn xyxy boxes in pixels of an image of this size into relative cxcywh."""
    height, width = size_hw
    low, high = objects["boxes"][:, :2], objects["boxes"][:, 2:]
    boxes_cxcywh = np.concatenate(((low + high) / np.float32(2), high - low), axis=1)
    return objects | {"boxes": boxes_cxcywh / np.array([width, height, width, height], dtype=np.float32)}


def to_model_input(image: Image.Image, target: Target) -> tuple[Tensor, Target]:
    """Turn an RGB picture into a normalised (3, H, W) float32 tensor and its boxes into relative cxcywh."""
    objects = relative_boxes(to_arrays(target), (image.height, image.width))
    return normalize_pixels(to_pixels(image)), to_tensors(objects)


class TrainTransform:
    """The official training augmentation: flip; then a resize, or a resize, a crop and a resize; then to tensor.

    Args:
        scales: short sides of the (last) resize.
        max_size: longest side after it.
        resize_before_crop: short sides of the resize before the crop, which has no longest side.
        crop_range: smallest and largest side of the crop window.
        fix_size: only flip and resize to exactly ``max_size`` x ``max(scales)`` (width x height).

    Raises:
        DatasetError: the sizes contradict each other.
    """

    def __init__(
        self,
        *,
        scales: Sequence[int] = TRAIN_SCALES,
        max_size: int = MAX_SIZE,
        resize_before_crop: Sequence[int] = RESIZE_BEFORE_CROP,
        crop_range: Sequence[int] = CROP_RANGE,
        fix_size: bool = False,
    ) -> None:
        _check_sizes(scales, max_size, resize_before_crop, crop_range)
        self.scales = list(scales)
        self.max_size = max_size
        self.resize_before_crop = list(resize_before_crop)
        self.crop_min, self.crop_max = crop_range
        self.fix_size = fix_size

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Augment one sample; a target with xyxy pixel boxes becomes one with relative cxcywh boxes."""
        return _apply(self.draw(image.width, image.height), image, target)

    def draw(self, width: int, height: int) -> Augmentation:
        """Draw what happens to a picture of this size."""
        flip = random.random() < 0.5
        if self.fix_size:
            # One possible size, yet drawn as official, so that the random numbers after it are the same.
            out_width, out_height = random.choice([(self.max_size, max(self.scales))])
            return Augmentation(flip, None, None, (out_height, out_width))
        before_crop_hw, window = None, None
        if random.random() >= 0.5:
            before_crop_hw = resized_hw(width, height, random.choice(self.resize_before_crop), None)
            window = self._window(before_crop_hw[1], before_crop_hw[0])
            height, width = window[2:]
        size = random.choice(self.scales)
        return Augmentation(flip, before_crop_hw, window, resized_hw(width, height, size, self.max_size))

    def _window(self, image_width: int, image_height: int) -> tuple[int, int, int, int]:
        width = random.randint(self.crop_min, min(image_width, self.crop_max))
        height = random.randint(self.crop_min, min(image_height, self.crop_max))
        if (width, height) == (image_width, image_height):
            return 0, 0, height, width
        top = int(torch.randint(0, image_height - height + 1, size=(1,)))
        left = int(torch.randint(0, image_width - width + 1, size=(1,)))
        return top, left, height, width


class EvalTransform:
    """Resize the short side to ``scale`` (longest side at most ``max_size``), then to tensor. Nothing random."""

    def __init__(self, *, scale: int = max(TRAIN_SCALES), max_size: int = MAX_SIZE) -> None:
        _check_sizes([scale], max_size)
        self.scale = scale
        self.max_size = max_size

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Prepare one sample; a target with xyxy pixel boxes becomes one with relative cxcywh boxes."""
        return _apply(self.draw(image.width, image.height), image, target)

    def draw(self, width: int, height: int) -> Augmentation:
        """Say what happens to a picture of this size."""
        return Augmentation(False, None, None, resized_hw(width, height, self.scale, self.max_size))


def _apply(plan: Augmentation, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
    objects = augment_objects(to_arrays(target), plan, width=image.width, height=image.height)
    return normalize_pixels(render_picture(image, plan)), to_tensors(objects)


def _check_sizes(
    scales: Sequence[int],
    max_size: int,
    resize_before_crop: Sequence[int] = RESIZE_BEFORE_CROP,
    crop_range: Sequence[int] = CROP_RANGE,
) -> None:
    if not scales or not resize_before_crop or min(*scales, *resize_before_crop, max_size) < 1:
        raise DatasetError(f"image sizes must be positive, got {list(scales)}, {list(resize_before_crop)}, {max_size}")
    if len(crop_range) != 2 or not 1 <= crop_range[0] <= crop_range[1]:
        raise DatasetError(f"--data_aug_scales2_crop takes the smallest and the largest side, got {list(crop_range)}")
    if crop_range[0] > min(resize_before_crop):
        raise DatasetError(
            f"the smallest crop window ({crop_range[0]}) exceeds the shortest side before the crop "
            f"({min(resize_before_crop)}): lower --data_aug_scales2_crop or raise --data_aug_scales2_resize"
        )
