"""Pieces of a training step: batches on the device, mixed precision, total loss, normalisers over several batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .distributed import mean_over_ranks
from .nested_tensor import NestedTensor
from .pixels import normalize_batch

T = TypeVar("T")
Batch = tuple[NestedTensor, Sequence[dict[str, Tensor]]]
Losses = dict[str, Tensor]


def backward(
    model: nn.Module,
    criterion: nn.Module,
    batches: Sequence[Batch],
    *,
    amp: bool,
    amp_dtype_name: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Losses:
    """Compute losses and gradients of one optimizer step, normalised over all its batches together.

    Args:
        model: the detector; criterion: gives losses and carries `weight_dict`.
        batches: one per forward pass, on the device of the model.
        amp, amp_dtype_name: `--amp` and `--amp_dtype`.
        scaler: scales the loss under float16.

    Returns:
        Raw losses and the weighted total as `loss`, detached. Sums over the batches for what is normalised by
        objects, means for the logged rest.
    """
    weight_dict: dict[str, float] = criterion.weight_dict  # type: ignore[assignment]
    normalisers = EffectiveBatch(batches, criterion) if len(batches) > 1 else None
    collected: list[Losses] = []
    for index, (samples, targets) in enumerate(batches):
        # Gradients travel between processes once, with the last backward pass.
        is_last = index == len(batches) - 1
        no_sync = contextlib.nullcontext() if is_last else getattr(model, "no_sync", contextlib.nullcontext)()
        with no_sync:
            with autocast(samples.tensors.device, enabled=amp, dtype=amp_dtype_name):
                outputs = model(samples, targets)
                extra = normalisers.arguments(outputs, targets) if normalisers is not None else {}
                losses = criterion(outputs, targets, **extra)
                losses["loss"] = weighted_sum(losses, weight_dict)
            (losses["loss"] if scaler is None else scaler.scale(losses["loss"])).backward()
        with torch.no_grad():  # one copy of all values instead of one detached view of each
            collected.append(dict(zip(losses, torch.stack(list(losses.values())).unbind(), strict=True)))
    return collected[0] if len(collected) == 1 else add_up(collected)


def add_up(collected: Sequence[Losses]) -> Losses:
    """Add up the losses of several batches; what is no loss, such as class_error, is a mean and stays one."""
    values: dict[str, list[Tensor]] = {}
    for losses in collected:
        for name, value in losses.items():
            values.setdefault(name, []).append(value)
    summed = {name: torch.stack(each).sum(0) for name, each in values.items()}
    return {name: value if "loss" in name else value / len(values[name]) for name, value in summed.items()}


class EffectiveBatch:
    """Normalisers that make several small batches equal one large one.

    Args:
        batches: all batches of one optimizer step.
        criterion: its `dn_normalizer`, if it has one, says over whom denoising losses are averaged.
    """

    def __init__(self, batches: Sequence[Batch], criterion: nn.Module) -> None:
        device = batches[0][0].tensors.device
        own = sum(len(target["labels"]) for _, targets in batches for target in targets)
        # Sent, not read: the host does not wait.
        self.own = torch.tensor(float(max(own, 1))).to(device, non_blocking=True)
        mean = torch.tensor(float(own)).to(device, non_blocking=True)
        self.num_boxes = mean_over_ranks(mean).clamp(min=1)
        self.known = self.num_boxes if getattr(criterion, "dn_normalizer", "local") == "global" else self.own

    def arguments(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what the criterion gets for one of the batches."""
        denoised = outputs.get("dn_meta")
        if denoised is None:
            return {"num_boxes": self.num_boxes}
        objects = sum(len(target["labels"]) for target in targets)
        # Every object stands in the denoising part as often as there are groups (twice with negatives).
        copies = len(denoised.meta.labels) // max(objects, 1)
        return {"num_boxes": self.num_boxes, "num_known": self.known * max(copies, 1)}


def weighted_sum(losses: Losses, weight_dict: Mapping[str, float]) -> Tensor:
    """Return the total loss; entries without a weight are only logged."""
    names = [name for name in losses if name in weight_dict]
    values = torch.stack([losses[name] for name in names])
    # Sent, not read: the host does not wait.
    weights = torch.tensor([weight_dict[name] for name in names], dtype=values.dtype)
    return (values * weights.to(values.device, non_blocking=True)).sum()


def amp_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of `--amp_dtype`; left out, float16 on a GPU and bfloat16 on a CPU."""
    return getattr(torch, name or ("float16" if device.type == "cuda" else "bfloat16"))


def autocast(device: torch.device, *, enabled: bool, dtype: str | None) -> torch.autocast:
    """Return the mixed precision context of `--amp` and `--amp_dtype`."""
    return torch.autocast(device.type, dtype=amp_dtype(dtype, device), enabled=enabled)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy images and targets to the device; uint8 pixels are normalised there, a quarter of the bytes to move."""
    samples, targets = batch
    moved = [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets]
    return normalize_batch(samples.to(device, non_blocking=True)), moved


def in_groups(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    while group := list(islice(items, size)):
        yield group
