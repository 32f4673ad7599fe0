"""Feature maps of a backbone brought to one width, and coarser levels added to them.

From "Deformable DETR: Deformable Transformers for End-to-End Object Detection", section "Multi-scale Deformable
Attention Module".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from util.errors import OptionError
from util.nested_tensor import NestedTensor

NUM_GROUPS = 32


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a (B, H, W) bool padding mask to (B, h, w), `size`, by its nearest value.

    Picks what `F.interpolate` picks. In whole numbers, because runtimes of exported models round its scale differently.
    """
    rows, columns = (
        torch.arange(wanted, device=mask.device) * given // wanted
        for wanted, given in zip(size, mask.shape[1:], strict=True)
    )
    return mask.index_select(1, rows).index_select(2, columns)


class ProjectedLevels(NamedTuple):
    """What a multi-scale transformer reads, finest level first.

    Attributes:
        sources: (B, C, h_i, w_i) feature maps.
        masks: (B, h_i, w_i) bool, True = padding.
        positions: (B, C, h_i, w_i) position encodings.
        padded: False where nothing in the masks is True.
    """

    sources: list[Tensor]
    masks: list[Tensor]
    positions: list[Tensor]
    padded: bool = True


class FeatureProjection(nn.ModuleList):
    """Project backbone maps to the transformer's width and derive coarser levels from the last one.

    One convolution and group norm per level: 1x1 for a backbone map, 3x3 with stride 2 for a derived one.
    """

    def __init__(self, in_channels: Sequence[int], hidden_dim: int, num_levels: int) -> None:
        """Build the projections, Xavier-uniform weights and zero biases.

        Args:
            in_channels: channels of each backbone map, finest first.
            hidden_dim: width of the transformer, a multiple of 32 (the groups of the norms).
            num_levels: levels given to the transformer, at least one per backbone map.

        Raises:
            OptionError: fewer levels than backbone maps, or a width that the groups cannot divide.
        """
        if not 1 <= len(in_channels) <= num_levels:
            raise OptionError(
                f"expected at least one feature level per backbone map, got {num_levels} levels for "
                f"{len(in_channels)} maps: raise --num_feature_levels"
            )
        if hidden_dim % NUM_GROUPS:
            raise OptionError(f"expected a --hidden_dim that is a multiple of {NUM_GROUPS}, got {hidden_dim}")
        levels = [nn.Conv2d(channels, hidden_dim, kernel_size=1) for channels in in_channels]
        for index in range(num_levels - len(in_channels)):
            source = in_channels[-1] if index == 0 else hidden_dim
            levels.append(nn.Conv2d(source, hidden_dim, kernel_size=3, stride=2, padding=1))
        super().__init__(nn.Sequential(conv, nn.GroupNorm(NUM_GROUPS, hidden_dim)) for conv in levels)
        self.num_backbone_levels = len(in_channels)
        for name, parameter in self.named_parameters():
            if name.endswith(".0.weight"):
                nn.init.xavier_uniform_(parameter)
            elif name.endswith(".0.bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        features: Sequence[NestedTensor],
        positions: Sequence[Tensor],
        image_mask: Tensor,
        position_encoding: nn.Module,
    ) -> ProjectedLevels:
        """Return all levels with their masks and position encodings.

        Args:
            features: backbone maps (B, C_i, h_i, w_i) with masks (B, h_i, w_i), finest first.
            positions: their encodings (B, C, h_i, w_i).
            image_mask: (B, H, W) bool, True = padding; masks of derived levels are taken from it.
            position_encoding: maps a (B, h, w) mask, and whether there is padding, to (B, C, h, w), for the derived
                levels.

        Raises:
            ValueError: another number of backbone maps than projections for them.
        """
        if len(features) != self.num_backbone_levels:
            raise ValueError(f"expected {self.num_backbone_levels} backbone maps, got {len(features)}")
        sources = [project(feature.tensors) for project, feature in zip(self, features, strict=False)]
        masks, padded = [feature.mask for feature in features], features[-1].padded
        encodings = list(positions)
        # The first derived level starts from the backbone's last map, before its projection; the next from the one
        # derived before.
        coarsest = features[-1].tensors
        for project in list(self)[self.num_backbone_levels :]:
            coarsest = project(coarsest)
            mask = resize_mask(image_mask, coarsest.shape[-2:])
            sources.append(coarsest)
            masks.append(mask)
            encodings.append(position_encoding(mask, padded=padded))
        return ProjectedLevels(sources, masks, encodings, padded)
