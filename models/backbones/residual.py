"""Residual blocks of torchvision's ResNets that scale weights where a frozen batch norm would scale feature maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

from .frozen_batch_norm import FrozenBatchNorm2d

Pair = tuple[nn.Conv2d, nn.Module]
Affines = Mapping[nn.Conv2d, tuple[Tensor, Tensor]]


def frozen_affines(pairs: Iterable[Pair]) -> dict[nn.Conv2d, tuple[Tensor, Tensor]]:
    """Return what the frozen batch norms after convolutions do: scale (C, 1, 1, 1) and shift (C,) by convolution.

    The vectors of all norms are computed as one, in a handful of operations.

    Args:
        pairs: convolutions without bias and the norms after them; pairs of other norms are left out.
    """
    if torch.compiler.is_compiling():
        return {}  # generated code joins products and sums by itself, and cannot take a convolution's bias from a split
    frozen = [(conv, norm) for conv, norm in pairs if isinstance(norm, FrozenBatchNorm2d)]
    if not frozen:
        return {}
    dtype = torch.promote_types(frozen[0][1].weight.dtype, torch.float32)
    weight, bias, mean, variance = (
        torch.cat([getattr(norm, name) for _, norm in frozen]).to(dtype)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    eps = frozen[0][1].eps  # a ResNet builds all its norms alike
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    lengths = [conv.out_channels for conv, _ in frozen]
    parts = zip(frozen, scale.view(-1, 1, 1, 1).split(lengths), shift.split(lengths), strict=True)
    return {conv: (scale, shift) for (conv, _), scale, shift in parts}


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module, affines: Affines | None) -> Tensor:
    """Apply a convolution and its norm; x is (B, C, h, w).

    With the norm's scale and shift at hand the weights are scaled instead of the feature map: what changes is one
    rounding. Gradients reach the weights of the convolution.
    """
    if not affines or conv not in affines:
        return norm(conv(x))
    scale, shift = affines[conv]
    weight = (conv.weight * scale).to(conv.weight.dtype)
    return F.conv2d(x, weight, shift.to(weight.dtype), conv.stride, conv.padding, conv.dilation, conv.groups)


class _Foldable(nn.Module):
    """What both kinds of block share; the children are torchvision's."""

    downsample: nn.Sequential | None

    @property
    def main_pairs(self) -> list[Pair]:
        """The convolutions of the main branch with their norms, in order."""
        children = dict(self.named_children())
        return [(children[f"conv{i}"], children[f"bn{i}"]) for i in (1, 2, 3) if f"conv{i}" in children]  # type: ignore[misc]

    @property
    def pairs(self) -> list[Pair]:
        """All convolutions with their norms."""
        if self.downsample is None:
            return self.main_pairs
        return [*self.main_pairs, (self.downsample[0], self.downsample[1])]  # type: ignore[list-item]

    def forward(self, x: Tensor, affines: Affines | None = None) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w'); `affines` as from `frozen_affines`."""
        shortcut = x if self.downsample is None else convolve(x, *self.pairs[-1], affines)
        *inner, last = self.main_pairs
        for conv, norm in inner:
            x = F.relu_(convolve(x, conv, norm, affines))
        return F.relu_(convolve(x, *last, affines).add_(shortcut))


class BasicBlock(_Foldable, resnet.BasicBlock):
    """Two convolutions (ResNet-18 and 34)."""


class Bottleneck(_Foldable, resnet.Bottleneck):
    """Three convolutions (ResNet-50 and 101)."""


# Name -> kind of block and blocks per stage.
RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}
