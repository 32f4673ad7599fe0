"""Going on with a run, or starting from weights: what `--resume` and `--pretrain_model_path` do."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import SAFETENSORS, load_checkpoint, load_newest, model_weights
from .distributed import get_rank, get_world_size
from .errors import CheckpointError
from .optim import drop_learning_rates, resync_learning_rates
from .pretrain import class_count, is_class_rows, load_pretrained_file
from .rng import set_rng_state
from .run_state import RunState

# Resumes by Deformable-DETR's rules, all others by DN-DETR's.
DEFORMABLE_RULES = "deformable_detr"
_log = logging.getLogger(__name__)


def restore(state: RunState, args: argparse.Namespace, folder: Path | None, *, coco_names: Mapping[int, str]) -> None:
    """Load what `--resume` or `--pretrain_model_path` names; with `--eval` only weights.

    Args:
        state: filled in place.
        args: options.
        folder: output folder, where `--resume auto` looks.
        coco_names: as `load_pretrained_file`.

    Raises:
        CheckpointError: it cannot be read or does not fit.
    """
    found = read_resume(args.resume, folder) if args.resume else None
    if found is not None:
        content, source = found
        if source.endswith(SAFETENSORS) and not args.eval:
            raise CheckpointError(
                f"{source} holds weights and no optimizer state to go on with: start from them with "
                f"--pretrain_model_path {source}, or evaluate them with --eval"
            )
        by_deformable_rules = args.modelname == DEFORMABLE_RULES
        restore_model(state.model, content, source, strict=not by_deformable_rules)
        if args.eval:
            restore_average(state, content, source)
            return
        override = args.lr_drop if args.override_resumed_lr_drop or by_deformable_rules else None
        restore_run(
            state,
            content,
            source,
            keep_given_rates=by_deformable_rules,
            override_lr_drop=override,
            drop_lr_now=args.drop_lr_now,
        )
    elif args.pretrain_model_path:
        load_pretrained_file(
            state.model,
            args.pretrain_model_path,
            ignore=args.finetune_ignore or (),
            model_classes=state.class_names,
            coco_names=coco_names,
        )
        state.restart_average()


def read_resume(source: str, output_dir: Path | None) -> tuple[dict[str, Any], str] | None:
    """Read what `--resume` names.

    Args:
        source: a file, an https address, or "auto" for the newest good one in `output_dir`.
        output_dir: where "auto" looks.

    Returns:
        (content, where from); None for "auto" in a folder without checkpoints.

    Raises:
        CheckpointError: it cannot be read.
    """
    if source != "auto":
        return load_checkpoint(source), source
    found = load_newest(output_dir) if output_dir is not None else None
    if found is None:
        _log.info("--resume auto: no checkpoint in %s, starting anew", output_dir)
        return None
    return found[0], str(found[1])


def restore_model(model: nn.Module, content: Mapping[str, Any], source: str, *, strict: bool = True) -> None:
    """Load a checkpoint's weights into the model they were made for.

    Args:
        strict: every name must be on both sides; otherwise differences are warned about (Deformable-DETR's rule).

    Raises:
        CheckpointError: the weights are of another model or class count.
    """
    weights, own = model_weights(content, source), model.state_dict()
    missing, unknown = [n for n in own if n not in weights], [n for n in weights if n not in own]
    unfit = [name for name, value in weights.items() if name in own and value.shape != own[name].shape]
    if unfit and all(map(is_class_rows, unfit)):
        raise CheckpointError(
            f"checkpoint has {class_count(weights)} classes, the model {class_count(own)}: --resume goes on with the "
            f"same classes; to fine-tune pass --pretrain_model_path {source} --finetune_ignore class_embed label_enc"
        )
    if unfit or (strict and (missing or unknown)) or len(unknown) == len(weights):
        raise CheckpointError(_other_model(source, content, missing, unknown, unfit, weights, own))
    if missing or unknown:
        _log.warning("%s lacks %s and holds the unknown %s", source, missing[:5] or "nothing", unknown[:5] or "nothing")
    model.load_state_dict(weights, strict=False)


def restore_run(
    state: RunState,
    content: Mapping[str, Any],
    source: str,
    *,
    keep_given_rates: bool = False,
    override_lr_drop: int | None = None,
    drop_lr_now: bool = False,
) -> None:
    """Continue a run: optimizer, schedule, scaler, average, random states and position.

    A file without optimizer, schedule and epoch (weights only) changes nothing here, as official.

    Args:
        state: filled in place; its model is restored by `restore_model`.
        keep_given_rates: Deformable-DETR's rule: rates stay those of the command line.
        override_lr_drop: replaces the restored epochs between two drops.
        drop_lr_now: divide every rate by ten afterwards.

    Raises:
        CheckpointError: the optimizer state is of another optimizer or model.
    """
    if not all(key in content for key in ("optimizer", "lr_scheduler", "epoch")):
        _log.warning("%s holds no optimizer, schedule and epoch: only its weights are used", source)
        return
    given = [(group["lr"], group["initial_lr"]) for group in state.optimizer.param_groups]
    _restore_optimizer(state.optimizer, content["optimizer"], source)
    state.scheduler.load_state_dict(dict(content["lr_scheduler"]))
    if keep_given_rates:
        for group, (rate, initial) in zip(state.optimizer.param_groups, given, strict=True):
            group["lr"], group["initial_lr"] = rate, initial
    if override_lr_drop is not None:
        state.scheduler.step_size = override_lr_drop
        state.scheduler.base_lrs = [group["initial_lr"] for group in state.optimizer.param_groups]
    resync_learning_rates(state.optimizer, state.scheduler)
    if drop_lr_now:
        drop_learning_rates(state.optimizer)
    if state.scaler is not None and "scaler" in content:
        state.scaler.load_state_dict(dict(content["scaler"]))
    restore_average(state, content, source)
    state.epoch = content["epoch"] + 1
    state.step = content.get("step", 0)
    _restore_position(state, content, source)
    _log.info("resumed %s: epoch %d, batch %d, step %d", source, state.epoch, state.batches_done, state.step)


def restore_average(state: RunState, content: Mapping[str, Any], source: str) -> None:
    """Load the average of the weights, or start it from the weights where the file has none."""
    if state.ema is not None and "ema" in content:
        state.ema.load_state_dict(content["ema"])
    elif state.ema is not None:
        _log.warning("%s holds no average of the weights: --ema starts from its weights", source)
        state.restart_average()


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: str) -> None:
    own_keys, saved_keys = (set(groups[0]) for groups in (optimizer.param_groups, saved["param_groups"]))
    # A key that only one of AdamW and SGD has.
    if ("betas" in own_keys) != ("betas" in saved_keys):
        raise CheckpointError(f"{source} was trained with another optimizer: give --sgd to both runs or to none")
    try:
        optimizer.load_state_dict(dict(saved))
    except ValueError as error:
        raise CheckpointError(
            f"the optimizer state in {source} does not fit the model's trainable parameters ({error}): resume with the "
            "options it was trained with, or start from its weights with --pretrain_model_path"
        ) from error


def _restore_position(state: RunState, content: Mapping[str, Any], source: str) -> None:
    random_states = content.get("rng")
    if not random_states:
        return
    own, saved_by = get_world_size(), len(random_states)
    if saved_by == own:
        set_rng_state(random_states[get_rank()])
    else:
        _log.warning("%s was saved by %d processes, there are %d now: random numbers start anew", source, saved_by, own)
    # The order of an epoch is the same for any number of processes, each batch of all takes the next images of it.
    images = content.get("batches_done", 0) * content.get("images_per_batch", state.images_per_batch)
    state.batches_done, rest = divmod(images, state.images_per_batch)
    if rest:
        state.batches_done = 0
        _log.warning(
            "%s was saved after %d images of epoch %d, which is no multiple of the %d images of a batch of all "
            "processes now: the sample order of the epoch starts anew",
            source,
            images,
            state.epoch,
            state.images_per_batch,
        )


def _other_model(
    source: str,
    content: Mapping[str, Any],
    missing: Sequence[str],
    unknown: Sequence[str],
    unfit: Sequence[str],
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> str:
    args = content.get("args")
    options = content.get("options") or (vars(args) if isinstance(args, argparse.Namespace) else {})
    trained_as = f" (it was trained with -m {options['modelname']})" if "modelname" in options else ""
    parts = [
        f"{len(names)} {what} such as {names[0]}"
        for what, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if unfit:
        shapes = f"{tuple(weights[unfit[0]].shape)} instead of {tuple(own[unfit[0]].shape)}"
        parts.append(f"{len(unfit)} of another shape such as {unfit[0]} {shapes}")
    return (
        f"checkpoint {source} is of another model{trained_as}: {', '.join(parts)}. Pass the options it was trained with"
    )
