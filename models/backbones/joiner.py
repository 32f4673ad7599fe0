"""Backbone and position encoding as one module: images in, feature maps with masks and encodings out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from util.errors import OptionError
from util.nested_tensor import NestedTensor

from ..layers.feature_projection import resize_mask
from .frozen_batch_norm import FrozenBatchNorm2d
from .resnet import ResNetBody, build_resnet
from .timm_backbone import TimmBody

TIMM_PREFIX = "timm:"

logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Compute feature maps and shrink the padding mask to each of them.

    A batch norm whose affine parameters are frozen keeps its statistics too, in training mode as well.

    Attributes:
        body: network that maps images to a list of feature maps.
    """

    body: ResNetBody | TimmBody

    def __init__(self, body: ResNetBody | TimmBody) -> None:
        super().__init__()
        self.body = body
        # A new module is in training mode already, but nobody has asked the frozen norms to leave it.
        self.train()

    def train(self, mode: bool = True) -> Backbone:
        """Switch training mode on or off, except for frozen batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(self, samples: NestedTensor) -> list[NestedTensor]:
        """Return one (B, C_i, h_i, w_i) map with its (B, h_i, w_i) padding mask per level, finest first."""
        maps = self.body(samples.tensors)
        return [NestedTensor(each, resize_mask(samples.mask, each.shape[-2:]), samples.padded) for each in maps]


class Joiner(nn.Sequential):
    """Compute feature maps and their position encodings.

    A sequence of two, so that checkpoint keys start with ``0.body.`` and ``1.`` as in DETR.

    Attributes:
        num_channels: channels of each level, finest first.
        strides: input pixels per feature pixel of each level, finest first.
    """

    def __init__(self, backbone: Backbone, position_encoding: nn.Module) -> None:
        super().__init__(backbone, position_encoding)
        self.num_channels = backbone.body.num_channels
        self.strides = backbone.body.strides

    @property
    def position_encoding(self) -> nn.Module:
        """The module that maps a (B, h, w) mask to (B, C, h, w); see `SinePositionEncoding.forward`."""
        return self[1]

    def forward(self, samples: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Return the feature maps with masks, and the encodings (B, C, h_i, w_i) of each level."""
        features = self[0](samples)
        return features, [self[1](feature.mask, padded=feature.padded) for feature in features]


def freeze_by_keywords(body: nn.Module, keywords: Sequence[str]) -> None:
    """Freeze the parameters whose name contains any of the keywords.

    Raises:
        OptionError: a keyword is in no name.
    """
    parameters = dict(body.named_parameters())
    for keyword in keywords:
        matching = [parameter for name, parameter in parameters.items() if keyword in name]
        if not matching:
            raise OptionError(
                f"--backbone_freeze_keywords: no backbone parameter has '{keyword}' in its name; names look like "
                f"{', '.join(list(parameters)[:: max(1, len(parameters) // 4)][:4])}"
            )
        for parameter in matching:
            parameter.requires_grad_(False)


def warn_if_it_cannot_learn(body: nn.Module) -> None:
    """Log a warning when a network of random weights has frozen batch norms."""
    if any(isinstance(module, FrozenBatchNorm2d) for module in body.modules()):
        logger.warning(
            "the backbone starts from random weights with frozen batch norm, which does not learn: "
            "pass --batch_norm_type BatchNorm2d, or --backbone_weights imagenet"
        )


def build_backbone(
    *,
    name: str,
    position_encoding: nn.Module,
    weights: str,
    train: bool,
    norm: str,
    dilation: bool,
    return_levels: int,
    num_stages: int = 4,
    freeze_keywords: Sequence[str] = (),
) -> Joiner:
    """Build a backbone with its starting weights and join it with a position encoding.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" or "timm:NAME".
        position_encoding: maps a (B, h, w) mask to (B, C, h, w).
        weights: "imagenet", "none" or the path of a file.
        train: False freezes the backbone. A pretrained ResNet trains from its second stage on, a timm model and a
            network of random weights as a whole.
        norm: "FrozenBatchNorm2d", "SyncBatchNorm" or "BatchNorm2d".
        dilation: DC5, the last stage keeps the resolution of the one before.
        return_levels: feature maps given out, counted from the last: 1 for the last alone, 3 for strides 8, 16, 32.
        num_stages: stages kept, 1 to 4; 3 ends at stride 16.
        freeze_keywords: parameters whose name contains one of them do not train.

    Raises:
        OptionError: an option that the backbone cannot honour.
        CheckpointError: weights that cannot be fetched, read or fitted.
    """
    # Typed as Any because mypy cannot follow the keywords through the dictionary.
    shared: dict[str, Any] = {
        "weights": weights,
        "norm": norm,
        "dilation": dilation,
        "num_stages": num_stages,
        "return_levels": return_levels,
    }
    body: ResNetBody | TimmBody
    if name.startswith(TIMM_PREFIX):
        body = TimmBody(name.removeprefix(TIMM_PREFIX), **shared).requires_grad_(train)
    else:
        body = build_resnet(name, train=train, **shared)
    freeze_by_keywords(body, freeze_keywords)
    if weights == "none":
        warn_if_it_cannot_learn(body)
    return Joiner(Backbone(body), position_encoding)
