"""Batch norms folded into the convolutions before them: at inference both together are one affine map."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .frozen_batch_norm import FrozenBatchNorm2d
from .resnet import ResNetBody

NORMS = (FrozenBatchNorm2d, _BatchNorm)


@torch.no_grad()
def fold_batch_norms(body: ResNetBody) -> None:
    """Fold every batch norm of a ResNet into its convolution, in place; the body is for inference only afterwards.

    Statistics must be those to infer with: batch norms in training mode would be folded with what they have so far.
    Results equal those before up to rounding.

    Args:
        body: its state dict changes: convolutions gain a bias, norms are gone.
    """
    for conv, norm in body.pairs():
        if isinstance(norm, NORMS):
            fold(conv, norm)
    for module in list(body.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NORMS):
                setattr(module, name, nn.Identity())


def fold(conv: nn.Conv2d, norm: Any) -> None:
    """Give a convolution the weight and bias of itself and the norm after it, in place.

    Raises:
        ValueError: the norm has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("expected a batch norm with running statistics, got one without: it cannot be folded")
    # In float64 and rounded once, so that folding costs no more than a rounding of the weights.
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale, shift, start = (None if v is None else v.double() for v in (norm.weight, norm.bias, conv.bias))
    weight, bias = fuse_conv_bn_weights(conv.weight.double(), start, mean, variance, norm.eps, scale, shift)
    conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
