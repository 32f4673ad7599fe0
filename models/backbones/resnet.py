"""torchvision's ResNets without classifier, giving the feature maps of their last stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from util.errors import OptionError

from .frozen_batch_norm import FrozenBatchNorm2d
from .pretrained import imagenet_state_dict, load_resnet_weights, read_state_dict
from .residual import RESNETS, BasicBlock, Bottleneck, Pair, convolve, frozen_affines

NORMS: dict[str, type[nn.Module]] = {
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "BatchNorm2d": nn.BatchNorm2d,
}


class ResNetBody(nn.Module):
    """Compute the feature maps of the last stages of a ResNet.

    Children have torchvision's names and order, so that checkpoints of detectors and ImageNet weights both fit.

    Attributes:
        num_channels: channels of each map given out, finest first.
        strides: input pixels per feature pixel of each map given out.
    """

    def __init__(
        self, name: str, *, norm: str, dilation: bool = False, num_stages: int = 4, return_levels: int = 1
    ) -> None:
        """Build the stages with torchvision's initial values.

        Args:
            name: one of ``RESNETS``.
            norm: key of ``NORMS``.
            dilation: DC5, the last stage dilates by 2 in place of its stride.
            num_stages: residual stages kept, 1 to 4; 3 ends at stride 16 and leaves no parameters of the fourth.
            return_levels: how many of the kept stages give their map out, counted from the last.

        Raises:
            OptionError: an unknown name or norm, or stages that do not exist.
        """
        super().__init__()
        if name not in RESNETS:
            raise OptionError(f"expected a backbone of {', '.join(RESNETS)}, got '{name}': use timm:NAME for others")
        if norm not in NORMS:
            raise OptionError(f"expected a batch norm of {', '.join(NORMS)}, got '{norm}'")
        if not 1 <= return_levels <= num_stages <= 4:
            raise OptionError(
                f"expected 1 <= feature maps <= stages <= 4, got {return_levels} maps of {num_stages} stages: "
                "raise --backbone_stages or lower --num_feature_levels"
            )
        if dilation and num_stages < 4:
            raise OptionError(f"--dilation changes the fourth stage, but only {num_stages} are kept: drop one option")
        block, blocks_of_stage = RESNETS[name]
        resnet = ResNet(block, blocks_of_stage, norm_layer=NORMS[norm])
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.stages = [f"layer{index}" for index in range(1, num_stages + 1)]
        for stage in self.stages:
            self.add_module(stage, getattr(resnet, stage))
        if dilation:
            replace_stride_by_dilation(self.get_submodule("layer4"))
        expansion = resnet.fc.in_features // 512
        self.return_levels = return_levels
        self.num_channels = [64 * expansion * 2**index for index in range(num_stages)][-return_levels:]
        strides = [4, 8, 16, 16 if dilation else 32][:num_stages]
        self.strides = strides[-return_levels:]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return ``return_levels`` maps (B, C_i, h_i, w_i) of (B, 3, H, W) images, finest first."""
        affines = frozen_affines(self.pairs())
        if affines:
            images = images.contiguous(memory_format=torch.channels_last)  # as the fast convolutions want them
        x = self.maxpool(self.relu(convolve(images, self.conv1, self.bn1, affines)))
        maps = []
        for stage in self.stages:
            for block in self.blocks(stage):
                x = block(x, affines)
            maps.append(x)
        return maps[-self.return_levels :]

    def blocks(self, stage: str) -> list[BasicBlock | Bottleneck]:
        """Return the blocks of a stage, in order."""
        return list(self.get_submodule(stage).children())  # type: ignore[arg-type]

    def pairs(self) -> list[Pair]:
        """Return all convolutions with the norms after them."""
        blocks = [block for stage in self.stages for block in self.blocks(stage)]
        return [(self.conv1, self.bn1), *(pair for block in blocks for pair in block.pairs)]


def replace_stride_by_dilation(stage: nn.Module) -> None:
    """Turn a stage of stride 2 into one of stride 1 that sees as far: DC5, in place.

    The 3x3 convolution that had the stride keeps its dilation of 1, every 3x3 convolution after it is dilated by 2, so
    that every other pixel of a block's output is what the strided stage computes. For bottleneck blocks this is
    torchvision's own rule; torchvision refuses it for the basic blocks of ResNet-18 and 34.
    """
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (3, 3) and module.stride == (1, 1):
                module.dilation, module.padding = (2, 2), (2, 2)
            module.stride = (1, 1)


def freeze_resnet(body: ResNetBody, *, train: bool, train_stem: bool) -> None:
    """Leave requires_grad only where the published detectors train: stages two to four.

    Args:
        body: the backbone.
        train: False freezes everything.
        train_stem: the stem and the first stage train as well.
    """
    for name, parameter in body.named_parameters():
        in_later_stage = name.startswith(("layer2.", "layer3.", "layer4."))
        parameter.requires_grad_(train and (train_stem or in_later_stage))


def build_resnet(
    name: str, *, weights: str, train: bool, norm: str, dilation: bool, num_stages: int, return_levels: int
) -> ResNetBody:
    """Build a ResNet, load its weights and freeze what does not train.

    The stem and the first stage stay frozen, their batch norms included, as published. Only with ``weights="none"``
    and trainable batch norm everything trains: that is training from scratch, where frozen random filters are useless.

    Args:
        weights: ``"imagenet"``, ``"none"`` or the path of a file.
        train: False freezes the whole backbone.
        name, norm, dilation, num_stages, return_levels: as for ``ResNetBody``.
    """
    body = ResNetBody(name, norm=norm, dilation=dilation, num_stages=num_stages, return_levels=return_levels)
    if weights == "imagenet":
        load_resnet_weights(body, imagenet_state_dict(name), "ImageNet")
    elif weights != "none":
        load_resnet_weights(body, read_state_dict(weights), f"'{weights}'")
    from_scratch = weights == "none" and norm != "FrozenBatchNorm2d"
    freeze_resnet(body, train=train, train_stem=from_scratch)
    return body
