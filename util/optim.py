"""Parameter groups, optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from .errors import OptionError

DROP_FACTOR = 0.1


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    lr_backbone: float,
    backbone_names: Sequence[str],
    linear_proj_names: Sequence[str] = (),
    linear_proj_mult: float = DROP_FACTOR,
) -> list[dict[str, Any]]:
    """Split the trainable parameters by rate: the rest, the backbone, and slow projections when names are given.

    The number and order of the groups are official (DN-DETR and DAB-DETR: two; Deformable-DETR: three), since an
    optimizer state is stored by index.

    Args:
        model: the detector.
        lr: rate of all that is in no other group.
        lr_backbone: rate of parameters whose name contains one of `backbone_names`.
        backbone_names, linear_proj_names: parts of parameter names; the backbone wins.
        linear_proj_mult: factor on `lr` for names that contain one of `linear_proj_names`.

    Raises:
        OptionError: names that fit no parameter of the model at all.
    """
    for option, fragments in (("lr_backbone_names", backbone_names), ("lr_linear_proj_names", linear_proj_names)):
        names = [name for name, _ in model.named_parameters()]
        if fragments and not any(_contains(name, fragments) for name in names):
            raise OptionError(f"--{option} {' '.join(fragments)} fits none of the model's {len(names)} parameters")
    rest: list[nn.Parameter] = []
    backbone: list[nn.Parameter] = []
    linear: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_backbone = _contains(name, backbone_names)
        group = backbone if is_backbone else linear if _contains(name, linear_proj_names) else rest
        group.append(parameter)
    groups = [{"params": rest, "lr": lr}, {"params": backbone, "lr": lr_backbone}]
    if linear_proj_names:
        groups.append({"params": linear, "lr": lr * linear_proj_mult})
    return groups


def build_optimizer(
    groups: list[dict[str, Any]], *, lr: float, weight_decay: float, sgd: bool
) -> torch.optim.Optimizer:
    """Build AdamW, or SGD with momentum 0.9."""
    # Fused: one kernel instead of about seven per tensor, on the CPU as well, and under float16 no flag is read.
    if sgd:
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def resync_learning_rates(optimizer: torch.optim.Optimizer, scheduler: StepLR) -> None:
    """Set every rate to what the schedule says for its epoch, as the official resume does.

    A rate that is already right to rounding stays as it is: repeated multiplication and the closed form may differ in
    the last bit, and a resumed run has to equal the undisturbed one.
    """
    drops = scheduler.last_epoch // scheduler.step_size
    for group, base_lr in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        wanted = base_lr * scheduler.gamma**drops
        if not math.isclose(group["lr"], wanted, rel_tol=1e-9):
            group["lr"] = wanted


def drop_learning_rates(optimizer: torch.optim.Optimizer) -> None:
    """Divide every rate by ten at once."""
    for group in optimizer.param_groups:
        group["lr"] *= DROP_FACTOR


def _contains(name: str, fragments: Sequence[str]) -> bool:
    return any(fragment in name for fragment in fragments)
