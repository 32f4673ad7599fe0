"""Any feature extractor of timm as a backbone."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from util.errors import CheckpointError, OptionError

from .frozen_batch_norm import freeze_batch_norm
from .pretrained import fetch_once, read_state_dict
from .resnet import NORMS


class FrozenBatchNormAct2d(nn.Module):
    """Apply frozen batch norm, then the activation that timm keeps inside some of its batch norms."""

    def __init__(self, norm: BatchNormAct2d) -> None:
        super().__init__()
        self.norm = freeze_batch_norm(norm)
        self.drop = norm.drop
        self.act = norm.act

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        return self.act(self.drop(self.norm(x)))


def convert_batch_norms(module: nn.Module, norm: str) -> nn.Module:
    """Replace every batch norm below a module; models without batch norm come back unchanged.

    Args:
        module: changed in place.
        norm: "FrozenBatchNorm2d", "SyncBatchNorm" or "BatchNorm2d" (leaves the model as it is).

    Raises:
        OptionError: an unknown norm.
    """
    if norm not in NORMS:
        raise OptionError(f"expected a batch norm of {', '.join(NORMS)}, got '{norm}'")
    if norm == "SyncBatchNorm":
        return convert_sync_batchnorm(module)
    if norm == "FrozenBatchNorm2d":
        for name, child in module.named_children():
            if isinstance(child, BatchNormAct2d):
                setattr(module, name, FrozenBatchNormAct2d(child))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, freeze_batch_norm(child))
            else:
                convert_batch_norms(child, norm)
    return module


class TimmBody(nn.Module):
    """Compute the last feature maps of a timm model.

    Attributes:
        num_channels: channels of each map given out, finest first.
        strides: input pixels per feature pixel of each map given out.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str,
        norm: str,
        dilation: bool = False,
        num_stages: int = 4,
        return_levels: int = 1,
    ) -> None:
        """Build the model and load its weights.

        Args:
            name: timm's name of the model.
            weights: "imagenet" (timm's default weights of the model), "none" or the path of a file in timm's naming.
            norm: "FrozenBatchNorm2d", "SyncBatchNorm" or "BatchNorm2d".
            dilation: end at stride 16 instead of 32, where the model can.
            num_stages: 4 allows strides up to 32, 3 up to 16, 2 up to 8, 1 up to 4.
            return_levels: how many maps to give out, counted from the last.

        Raises:
            OptionError: an unknown name, a model that cannot dilate, or fewer maps than asked for.
            CheckpointError: weights that cannot be fetched or do not fit.
        """
        super().__init__()
        outline = probe(name)
        accepted = inspect.signature(type(outline).__init__).parameters
        if dilation and num_stages < 4:
            raise OptionError(f"--dilation changes the fourth stage, but only {num_stages} are kept: drop one option")
        if dilation and "output_stride" not in accepted:
            raise OptionError(f"timm:{name} cannot dilate its last stage: drop --dilation")
        options: dict[str, Any] = {"output_stride": 16} if dilation else {}
        # Detectors see images of every size; some transformers insist on the size of their training unless told.
        sizes = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}
        options.update({key: value for key, value in sizes.items() if key in accepted})
        options["out_indices"] = last_levels(outline, name, 2 ** (num_stages + 1), return_levels)
        model = create(outline, name, weights, **options)
        self.model = convert_batch_norms(model, norm)
        self.channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        self.num_channels: list[int] = list(model.feature_info.channels())
        self.strides: list[int] = list(model.feature_info.reduction())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return ``return_levels`` maps (B, C_i, h_i, w_i) of (B, 3, H, W) images, finest first."""
        maps = self.model(images)
        return [each.permute(0, 3, 1, 2) for each in maps] if self.channels_last else list(maps)


def probe(name: str) -> Any:
    """Return a timm model without memory for its weights: its class, its names and its list of feature maps.

    Raises:
        OptionError: timm has no such model, or it lists no feature maps.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"; near ones: {', '.join(near)}" if near else ""
        raise OptionError(f"expected timm:NAME with a name that timm {timm.__version__} knows, got '{name}'{hint}")
    with torch.device("meta"):
        model = timm.create_model(name)
    if not getattr(model, "feature_info", None):
        raise OptionError(f"timm:{name} gives no feature maps: choose a model that supports features_only")
    return model


def last_levels(outline: Any, name: str, largest_stride: int, return_levels: int) -> tuple[int, ...]:
    """Return the indices of the last feature maps whose stride is at most ``largest_stride``.

    Raises:
        OptionError: the model has fewer.
    """
    kept = [index for index, info in enumerate(outline.feature_info) if info["reduction"] <= largest_stride]
    if len(kept) < return_levels:
        raise OptionError(
            f"expected {return_levels} feature maps of timm:{name}, it has {len(kept)} with strides up to "
            f"{largest_stride}: lower --num_feature_levels or raise --backbone_stages"
        )
    return tuple(kept[-return_levels:])


def create(outline: Any, name: str, weights: str, **options: Any) -> Any:
    """Create a features-only timm model with its weights.

    Raises:
        OptionError: the model's code refuses one of the options.
        CheckpointError: the weights cannot be fetched or do not fit the model.
    """

    def features_only(**pretrained: Any) -> Any:
        try:
            return timm.create_model(name, features_only=True, **options, **pretrained)
        except (AssertionError, NotImplementedError) as error:
            raise OptionError(f"timm:{name} does not accept {options} ({error}): choose another model") from error

    if weights == "none":
        return features_only()
    if weights == "imagenet":
        return fetch_once(lambda: features_only(pretrained=True), f"the weights of timm:{name}")
    state_dict = read_state_dict(weights)
    check_names(outline, state_dict, f"'{weights}'")
    return features_only(pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict})


def check_names(outline: Any, state_dict: dict[str, Tensor], source: str) -> None:
    """Check that a file has every tensor of a model, which timm itself does not insist on.

    Args:
        outline: the whole model, from ``probe``.
        state_dict: content of the file.
        source: name of the file, for the error message.

    Raises:
        CheckpointError: a tensor is missing or has another shape; only the classifier may.
    """
    classifiers = outline.default_cfg.get("classifier") or ()
    spare = tuple(f"{each}." for each in ([classifiers] if isinstance(classifiers, str) else classifiers))
    needed = {key: value.shape for key, value in outline.state_dict().items() if not key.startswith(spare)}
    wrong = [key for key, shape in needed.items() if key not in state_dict or state_dict[key].shape != shape]
    if wrong:
        raise CheckpointError(
            f"expected the {len(needed)} tensors of timm:{outline.default_cfg['architecture']} in {source}, "
            f"{len(wrong)} are missing or have another shape, such as '{wrong[0]}': pass a file in timm's naming that "
            "was saved from the same model"
        )
