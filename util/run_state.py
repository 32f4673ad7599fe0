"""Everything a run needs to go on where it stopped: collecting it, saving it by the official rules, restoring it."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from .checkpoint import atomic_save, save_latest
from .distributed import all_gather_object, is_main_process
from .ema import ModelEma
from .errors import CheckpointError
from .optim import build_optimizer, parameter_groups
from .rng import get_rng_state
from .step import amp_dtype

FORMAT_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass
class RunState:
    """The parts of a run that change while it trains.

    Attributes:
        model: the detector, unwrapped.
        optimizer, scheduler, scaler, ema: as used; scaler and ema may be absent.
        epoch: the epoch in progress, or the next one when `batches_done` is 0.
        step: optimizer steps done.
        batches_done: batches of `epoch` already trained on by this process.
        images_per_batch: images of one batch of all processes together.
        class_names: class of every label; category_ids: its id in the annotation file.
        options: all options as plain values.
        stop_on_save_error: raise when a checkpoint cannot be written, or only say so.
        saved_at: when `checkpoint.pth` was last written, or tried to, in `time.monotonic` seconds.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: StepLR
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEma | None = None
    epoch: int = 0
    step: int = 0
    batches_done: int = 0
    images_per_batch: int = 1
    class_names: Sequence[str] = ()
    category_ids: Sequence[int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    stop_on_save_error: bool = True
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def evaluated_model(self) -> nn.Module:
        """The average of the weights where there is one, else the model."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Collect everything, with the random states of all processes; every process must call it.

        `epoch` in the file is the last finished one, as in official files.
        """
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "batches_done": self.batches_done,
            "images_per_batch": self.images_per_batch,
            "rng": all_gather_object(get_rng_state()),
            "class_names": list(self.class_names),
            "category_ids": list(self.category_ids),
            "options": dict(self.options),
            "versions": {"torch": str(torch.__version__), "format": FORMAT_VERSION},
        }
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def save(self, folder: Path | None, names: Sequence[str] = (), *, keep: int = 2, latest: bool = True) -> None:
        """Write `checkpoint.pth` and copies under further names; every process must call it.

        Args:
            folder: None saves nothing.
            names: further file names.
            keep: as `checkpoint.save_latest`.
            latest: False writes only the further names.

        Raises:
            CheckpointError: process 0 cannot write; raised on every process, and only with `stop_on_save_error`.
        """
        if folder is None:
            return
        state = self.state_dict()
        failure = _write(state, folder, names, keep=keep, latest=latest) if is_main_process() else ""
        self.saved_at = time.monotonic()
        # Every process learns of it: those that go on alone would wait for process 0 until the timeout.
        failure = next(filter(None, all_gather_object(failure)), "")
        if failure and self.stop_on_save_error:
            raise CheckpointError(failure)
        if failure and is_main_process():
            _log.error("%s. Training goes on without this checkpoint (--on_save_error continue)", failure)

    def finish_epoch(self, folder: Path | None, *, lr_drop: int, interval: int, keep: int) -> None:
        """Move on to the next epoch: step the schedule and write the files the official rules ask for.

        Args:
            folder: None saves nothing.
            lr_drop, interval: `--lr_drop` and `--save_checkpoint_interval`.
            keep: as `checkpoint.save_latest`.

        Raises:
            CheckpointError: as `save`.
        """
        done = self.epoch
        self.epoch, self.batches_done = done + 1, 0
        before = numbered_names(done, lr_drop=lr_drop, interval=interval, before_drop=True)
        if before:
            self.save(folder, before, latest=False)
        self.scheduler.step()
        self.save(folder, numbered_names(done, lr_drop=lr_drop, interval=interval, before_drop=False), keep=keep)

    def restart_average(self) -> None:
        """Let the average of the weights start from the weights, if there is one."""
        if self.ema is not None:
            self.ema.restart_from(self.model)


def build_run_state(
    model: nn.Module, device: torch.device, args: argparse.Namespace, class_names: Sequence[str]
) -> RunState:
    """Build optimizer, schedule, scaler and average for a model that is on its device.

    Raises:
        OptionError: names of parameter groups that fit nothing.
    """
    groups = parameter_groups(
        model,
        lr=args.lr,
        lr_backbone=args.lr_backbone,
        backbone_names=args.lr_backbone_names,
        linear_proj_names=args.lr_linear_proj_names,
        linear_proj_mult=args.lr_linear_proj_mult,
    )
    optimizer = build_optimizer(groups, lr=args.lr, weight_decay=args.weight_decay, sgd=args.sgd)
    needs_scaler = args.amp and amp_dtype(args.amp_dtype, device) is torch.float16
    return RunState(
        model=model,
        optimizer=optimizer,
        scheduler=StepLR(optimizer, args.lr_drop),
        scaler=torch.amp.GradScaler(device.type) if needs_scaler else None,
        ema=ModelEma(model, args.ema_decay) if args.ema else None,
        epoch=args.start_epoch,
        images_per_batch=args.batch_size * args.world_size,
        class_names=class_names,
        options=vars(args),
        stop_on_save_error=args.on_save_error == "stop",
    )


def _write(state: Mapping[str, Any], folder: Path, names: Sequence[str], *, keep: int, latest: bool) -> str:
    """Write what `RunState.save` asks for; return the first failure as a sentence, empty for none."""
    failures = []
    for name in names:
        try:
            atomic_save(state, folder / name)
        except CheckpointError as error:
            failures.append(str(error))
    try:
        if latest:
            save_latest(state, folder, keep)
    except CheckpointError as error:
        failures.append(str(error))
    return failures[0] if failures else ""


def numbered_names(epoch: int, *, lr_drop: int, interval: int, before_drop: bool) -> list[str]:
    """Return the numbered files the official code writes after an epoch.

    Args:
        epoch: the epoch just trained.
        lr_drop, interval: `--lr_drop` and `--save_checkpoint_interval`.
        before_drop: the moment before the schedule's step, else after it.
    """
    drops = (epoch + 1) % lr_drop == 0
    if before_drop:
        return [f"checkpoint{epoch:04d}_beforedrop.pth"] if drops else []
    return [f"checkpoint{epoch:04d}.pth"] if drops or (epoch + 1) % interval == 0 else []
