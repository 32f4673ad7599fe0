"""Batches of images of different sizes: one padded tensor and the mask that says where the padding is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NestedTensor(NamedTuple):
    """A padded batch.

    Attributes:
        tensors: (B, 3, H, W) images, zero where padded at the bottom and right.
        mask: (B, H, W) bool, True = padding.
        padded: False where the host knows, without asking the device, that there is no padding.
    """

    tensors: Tensor
    mask: Tensor
    padded: bool = True

    @property
    def padding_mask(self) -> Tensor | None:
        """The mask, None where there is no padding: attention is faster without."""
        return self.mask if self.padded else None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NestedTensor:
        """Copy the batch to a device."""
        tensors, mask = (part.to(device, non_blocking=non_blocking) for part in self.decompose())
        return NestedTensor(tensors, mask, self.padded)

    def pin_memory(self) -> NestedTensor:
        """Copy the batch into page-locked memory (called by the data loader)."""
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory(), self.padded)

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Return (tensors, mask)."""
        return self.tensors, self.mask


def nested_tensor_from_tensor_list(images: Sequence[Tensor], multiple: int = 1) -> NestedTensor:
    """Pad images with zeros at the bottom and right to the largest height and width among them.

    Args:
        images: (3, H_i, W_i) tensors of one dtype and device.
        multiple: height and width of the batch are rounded up to multiples of so many pixels.

    Returns:
        NestedTensor of (B, 3, H, W) and its (B, H, W) padding mask; `padded` is False where all images have the size of
        the batch.

    Raises:
        ValueError: the list is empty, an image has not three axes, or `multiple` is below 1.
    """
    if multiple < 1:
        raise ValueError(f"expected sizes to be rounded up to a multiple of at least 1 pixel, got {multiple}")
    if not images or any(image.ndim != 3 for image in images):
        shapes = [tuple(image.shape) for image in images]
        raise ValueError(f"expected a non-empty list of (C, H, W) images, got shapes {shapes}")
    height, width = (-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    shape = (len(images), images[0].shape[0], height, width)
    if images[0].stride(0) == 1:
        # Pixels lie as decoders write them, the colours of one together: kept so, then whole rows can be copied.
        batch = images[0].new_empty((shape[0], *shape[2:], shape[1])).permute(0, 3, 1, 2)
    else:
        batch = images[0].new_empty(shape)
    mask = torch.zeros((len(images), height, width), dtype=torch.bool, device=images[0].device)
    for index, image in enumerate(images):
        h, w = image.shape[-2:]
        batch[index, :, :h, :w] = image
        # Not the whole batch before the copy, which would write most of it twice.
        if h < height:
            batch[index, :, h:], mask[index, h:] = 0, True
        if w < width:
            batch[index, :, :h, w:], mask[index, :h, w:] = 0, True
    return NestedTensor(batch, mask, padded=any(image.shape[1:] != (height, width) for image in images))


def as_nested_tensor(samples: NestedTensor | Sequence[Tensor]) -> NestedTensor:
    """Pad a list of images; return a NestedTensor as it is."""
    return samples if isinstance(samples, NestedTensor) else nested_tensor_from_tensor_list(samples)
