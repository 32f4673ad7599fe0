"""Train and evaluation transforms, pixel for pixel and random call for random call those of DETR and its descendants.

A target's ``boxes`` are xyxy in pixels until `to_model_input` makes them cxcywh relative to the image. Random numbers
come from the python ``random`` module (flip, branch, sizes) and, for the position of the crop window, from torch's
default generator, in the official order. Nothing here seeds them: `datasets.loader` does, per sample. What is drawn
depends on the size of the picture alone: drawing, pixels (`datasets.rendering`) and targets are three separate steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from util.box_ops import box_xyxy_to_cxcywh
from util.pixels import normalize_pixels

from .annotations import DatasetError, Target
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
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), hflip_target(target, image.width)


def hflip_target(target: Target, width: int) -> Target:
    """Mirror the boxes in a picture of this width."""
    x0, y0, x1, y1 = target["boxes"].unbind(-1)
    return target | {"boxes": torch.stack((width - x1, y0, width - x0, y1), dim=-1)}


def resize(image: Image.Image, target: Target, size_hw: tuple[int, int]) -> tuple[Image.Image, Target]:
    """Resize the image bilinearly with antialiasing, its boxes and areas with it."""
    resized = image.resize(size_hw[::-1], Image.Resampling.BILINEAR)
    return resized, resize_target(target, (image.height, image.width), size_hw)


def resize_target(target: Target, from_hw: tuple[int, int], size_hw: tuple[int, int]) -> Target:
    """Scale boxes and areas with a picture that is resized."""
    scale_y, scale_x = (new / old for new, old in zip(size_hw, from_hw, strict=True))
    return target | {
        "boxes": target["boxes"] * torch.tensor([scale_x, scale_y, scale_x, scale_y]),
        "area": target["area"] * (scale_x * scale_y),
        "size": torch.tensor(size_hw),
    }


def crop(image: Image.Image, target: Target, window: tuple[int, int, int, int]) -> tuple[Image.Image, Target]:
    """Cut a window (top, left, height, width) out of the image, and see `crop_target`."""
    top, left, height, width = window
    return image.crop((left, top, left + width, top + height)), crop_target(target, window)


def crop_target(target: Target, window: tuple[int, int, int, int]) -> Target:
    """Drop objects that lose their whole area; the others get the area of the box left.

    Args:
        target: boxes xyxy in pixels.
        window: (top, left, height, width) in pixels.
    """
    top, left, height, width = window
    boxes_xyxy = target["boxes"] - torch.tensor([left, top, left, top], dtype=torch.float32)
    boxes_xyxy = boxes_xyxy.minimum(torch.tensor([width, height, width, height], dtype=torch.float32)).clamp(min=0)
    extent = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)
    return target | {
        "boxes": boxes_xyxy[keep],
        "area": (extent[:, 0] * extent[:, 1])[keep],
        "labels": target["labels"][keep],
        "iscrowd": target["iscrowd"][keep],
        "size": torch.tensor([height, width]),
    }


def augment_target(target: Target, plan: Augmentation, *, width: int, height: int) -> Target:
    """Carry the objects of a picture along with what is done to it.

    Args:
        target: boxes xyxy in pixels.
        plan: what is done.
        width, height: size of the picture before.

    Returns:
        The target with ``boxes`` cxcywh relative to the outcome.
    """
    size_hw = (height, width)
    if plan.flip:
        target = hflip_target(target, width)
    if plan.before_crop_hw is not None and plan.window is not None:
        target = crop_target(resize_target(target, size_hw, plan.before_crop_hw), plan.window)
        size_hw = plan.window[2:]
    return relative_boxes(resize_target(target, size_hw, plan.size_hw), plan.size_hw)


def relative_boxes(target: Target, size_hw: tuple[int, int]) -> Target:
    """Turn xyxy boxes in pixels of an image of this size into relative cxcywh."""
    height, width = size_hw
    return target | {"boxes": box_xyxy_to_cxcywh(target["boxes"]) / torch.tensor([width, height, width, height])}


def to_model_input(image: Image.Image, target: Target) -> tuple[Tensor, Target]:
    """Turn an RGB picture into a normalised (3, H, W) float32 tensor and its boxes into relative cxcywh."""
    return normalize_pixels(to_pixels(image)), relative_boxes(target, (image.height, image.width))


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
    target = augment_target(target, plan, width=image.width, height=image.height)
    return normalize_pixels(render_picture(image, plan)), target


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
