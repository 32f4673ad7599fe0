"""Batch normalisation whose statistics and affine parameters are constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Normalise each channel with fixed statistics.

    Detectors train on a few images per process, too few to estimate statistics, so the four vectors are buffers:
    no optimizer changes them. Names and order of the buffers are those of DETR checkpoints.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Trainable batch norm counts its batches; frozen statistics have no use for the number.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift (B, C, h, w) per channel; the result keeps the dtype of ``x``."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # A product with a constant keeps no activation for the backward pass, which F.batch_norm would.
        # Adding in place spares one allocation of the size of the feature map.
        return x.mul(scale.to(x.dtype)[:, None, None]).add_(shift.to(x.dtype)[:, None, None])

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.weight.numel()}, eps={self.eps}"


def freeze_batch_norm(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    """Return the frozen twin of a batch norm: same eps, affine parameters and statistics, on the same device."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("expected a batch norm with running statistics, got one without: it cannot be frozen")
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.running_mean, frozen.running_var = norm.running_mean.detach(), norm.running_var.detach()
    if norm.affine:
        frozen.weight, frozen.bias = norm.weight.detach(), norm.bias.detach()
    else:
        frozen.to(norm.running_mean.device)
    return frozen
