"""Normalisation of pictures, as every pretrained backbone expects it."""

from __future__ import annotations

import torch
from torch import Tensor

from .nested_tensor import NestedTensor

# Mean and deviation of ImageNet, per RGB channel in [0, 1].
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Turn (..., 3, H, W) uint8 pixels into float32 with about zero mean and unit deviation, on the same device."""
    # Tensors, sent in one go: a GPU multiplies by the rounded inverse of a plain number instead of dividing by it,
    # and the host need not wait.
    constants = torch.tensor([(255.0,) * 3, IMAGE_MEAN, IMAGE_STD])[..., None, None]
    whole, mean, std = constants.to(pixels.device, non_blocking=True)
    tensor = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device).copy_(pixels)
    return tensor.div_(whole).sub_(mean).div_(std)


def normalize_batch(samples: NestedTensor) -> NestedTensor:
    """Normalise a padded batch of uint8 pixels; padding becomes zero, a batch of floats stays as it is."""
    if samples.tensors.dtype != torch.uint8:
        return samples
    return samples._replace(tensors=normalize_pixels(samples.tensors).masked_fill_(samples.mask[:, None], 0))
