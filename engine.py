"""One epoch of training and one evaluation. Model, criterion and loaders come from the caller; no model is special."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from util.checkpoint import atomic_save
from util.distributed import get_rank, is_main_process
from util.ema import ModelEma
from util.errors import NonFiniteLossError
from util.metrics import MetricLogger, loss_stats
from util.progress import track
from util.rng import get_rng_state
from util.step import Batch, Losses, autocast, backward, in_groups, to_device, weighted_sum

DEBUG_BATCHES = 15
SHOWN = ("loss", "class_error", "loss_ce", "loss_bbox", "loss_giou")
_log = logging.getLogger(__name__)


class Loader(Sized, Protocol):
    """What gives the batches: iterable, with the length of a whole epoch."""

    def __iter__(self) -> Iterator[Any]: ...


class Evaluator(Protocol):
    """What turns detections into average precision, see `datasets.coco_eval.CocoEvaluator`."""

    coco_eval: dict[str, Any]

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the detections of some images."""

    def synchronize_between_processes(self) -> None:
        """Merge the images of all processes."""

    def accumulate(self) -> None:
        """Compute precision and recall over all images."""

    def summarize(self) -> Any:
        """Compute the 12 figures and return their table."""


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Loader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    *,
    args: Namespace,
    scaler: torch.amp.GradScaler | None = None,
    ema: ModelEma | None = None,
    first_batch: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        model: the detector, possibly wrapped for several processes.
        criterion: gives losses and carries `weight_dict`.
        data_loader: batches from number `first_batch` on; its length is that of the whole epoch.
        device: where to compute.
        epoch: number of the epoch, for messages.
        args: options.
        scaler: scales the loss under float16.
        ema: follows the weights.
        first_batch: batches of this epoch that were trained on before.
        after_step: called after each optimizer step with the batches done in this epoch.

    Returns:
        Means over the epoch and all processes by official log name, and `lr`.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; the weights are those before the step.
    """
    model.train()
    criterion.train()
    meters = MetricLogger()
    parameters = list(model.parameters())
    batches_done = first_batch
    total = min(len(data_loader), DEBUG_BATCHES) if args.debug else len(data_loader)
    groups = in_groups(islice(data_loader, max(total - first_batch, 0)), args.accumulate_steps)
    num_groups = math.ceil(max(total - first_batch, 0) / args.accumulate_steps)
    weight_dict: dict[str, float] = criterion.weight_dict  # type: ignore[assignment]
    shown = (*SHOWN, "tgt_loss_ce", "grad_norm")
    show = {
        "describe": lambda: meters.describe(shown, weight_dict),
        "every": args.print_freq,
        "show": is_main_process(),
    }
    for batches in track(groups, total=num_groups, header=f"epoch {epoch}", **show):
        rng_state = get_rng_state()
        batches = [to_device(batch, device) for batch in batches]
        optimizer.zero_grad(set_to_none=True)
        losses = backward(model, criterion, batches, amp=args.amp, amp_dtype_name=args.amp_dtype, scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = losses["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.clip_max_norm or math.inf)
        # Under float16 the scaler skips a step with infinite gradients itself; an infinite norm would spoil the mean.
        meters.update(losses if scaler is None else losses | {"grad_norm": norm.nan_to_num(nan=0.0, posinf=0.0)})
        # The one host synchronisation per step beside that of the matcher: log lines find everything on the host.
        newest = meters.read()
        if not (math.isfinite(newest["loss"]) and math.isfinite(newest["grad_norm"])):
            stop_non_finite(model, batches, losses, rng_state, epoch=epoch, batch=batches_done, folder=args.output_dir)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if ema is not None:
            ema.update(getattr(model, "module", model))
        batches_done += len(batches)
        if after_step is not None:
            after_step(batches_done)
    meters.synchronize()
    return loss_stats(meters.averages(), weight_dict) | {"lr": optimizer.param_groups[0]["lr"]}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: Mapping[str, Any],
    data_loader: Loader,
    evaluator: Evaluator,
    device: torch.device,
    *,
    args: Namespace,
    to_categories: Callable[[Tensor], Tensor] = lambda labels: labels,
    after_batch: Callable[[dict[str, Any], Sequence[dict[str, Tensor]]], None] | None = None,
) -> dict[str, Any]:
    """Compute losses and average precision over a data set, each image once.

    Differs from official: losses are summed and divided once by the objects of the whole data set, so that they do
    not depend on batch size, padding or number of processes.

    Args:
        model: the detector, unwrapped: processes may have unequal numbers of batches.
        postprocessors: "bbox" turns outputs into detections.
        data_loader: batches of this process.
        evaluator: takes the detections; accumulated and summarised on return.
        to_categories: labels of the model -> category ids of the evaluator.
        after_batch: called with the outputs and targets of every batch.

    Returns:
        Losses by official log name and `coco_eval_bbox`, the 12 figures.
    """
    model.eval()
    criterion.eval()
    meters = MetricLogger()
    saved: dict[str, list[Any]] = {"image_id": [], "gt_info": [], "res_info": []}
    total = min(len(data_loader), DEBUG_BATCHES) if args.debug else len(data_loader)
    weight_dict: dict[str, float] = criterion.weight_dict  # type: ignore[assignment]
    show = {
        "describe": lambda: meters.describe(SHOWN, weight_dict),
        "every": args.print_freq,
        "show": is_main_process(),
    }
    for batch in track(islice(data_loader, total), total=total, header="evaluation", **show):
        samples, targets = to_device(batch, device)
        with autocast(device, enabled=args.amp, dtype=args.amp_dtype):
            outputs = model(samples)
            losses = criterion(outputs, targets, num_boxes=torch.ones((), device=device))
        losses["loss"] = weighted_sum(losses, weight_dict)
        meters.update(*as_sums(losses, num_images=len(targets), num_boxes=sum(len(t["labels"]) for t in targets)))
        sizes = torch.stack([target["orig_size"] for target in targets])
        results = postprocessors["bbox"](outputs, sizes)
        ids = torch.cat([target["image_id"] for target in targets]).tolist()
        evaluator.update(
            {
                image_id: {**result, "labels": to_categories(result["labels"])}
                for image_id, result in zip(ids, results, strict=True)
            }
        )
        if args.save_results:
            collect_results(saved, ids, targets, results)
        if after_batch is not None:
            after_batch(outputs, targets)
    if args.save_results:
        atomic_save(saved, Path(args.output_dir) / f"results-{get_rank()}.pkl")
    meters.synchronize()
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    stats: dict[str, Any] = loss_stats(meters.averages(), weight_dict)
    return stats | {"coco_eval_bbox": [float(figure) for figure in evaluator.coco_eval["bbox"].stats]}


def as_sums(losses: Losses, *, num_images: int, num_boxes: int) -> tuple[Losses, dict[str, float]]:
    """Turn the losses of a batch, computed with a normaliser of one, into (sums, how many things each sums up)."""
    sums, counts = {}, {}
    for name, value in losses.items():
        if "loss" in name:
            sums[name], counts[name] = value, float(num_boxes)
            continue
        counts[name] = float(num_boxes if "class_error" in name else num_images)
        sums[name] = value * counts[name]
    return sums, counts


def collect_results(
    saved: dict[str, list[Any]],
    image_ids: Sequence[int],
    targets: Sequence[Mapping[str, Tensor]],
    results: Sequence[Mapping[str, Tensor]],
) -> None:
    """Add ground truth (n, 5: cxcywh, label) and detections (m, 6: cxcywh, score, label) of a batch, boxes in [0, 1].

    Differs from official: boxes are those the scores belong to, which there are two different orders.
    """
    for image_id, target, result in zip(image_ids, targets, results, strict=True):
        height, width = target["orig_size"].to(result["boxes"]).unbind()
        corners = result["boxes"] / torch.stack((width, height, width, height))
        boxes = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), dim=1)
        found = (boxes, result["scores"][:, None], result["labels"][:, None].to(boxes))
        saved["image_id"].append(image_id)
        saved["gt_info"].append(torch.cat((target["boxes"], target["labels"][:, None].to(boxes)), dim=1).cpu())
        saved["res_info"].append(torch.cat(found, dim=1).cpu())


def stop_non_finite(
    model: nn.Module,
    batches: Sequence[Batch],
    losses: Losses,
    rng_state: Mapping[str, Any],
    *,
    epoch: int,
    batch: int,
    folder: str,
) -> None:
    """Save what reproduces a step without a finite loss, and stop.

    Raises:
        NonFiniteLossError: always; names losses, image ids and the file.
    """
    names = [name for name, value in losses.items() if not torch.isfinite(value).item()]
    image_ids = [int(target["image_id"]) for _, targets in batches for target in targets]
    where = "nowhere, for lack of --output_dir"
    if folder:
        path = Path(folder) / f"nonfinite_epoch{epoch}_batch{batch}_rank{get_rank()}.pth"
        content = {
            "batches": [{"tensors": s.tensors, "mask": s.mask, "targets": list(t)} for s, t in batches],
            "model": getattr(model, "module", model).state_dict(),
            "losses": {name: value.item() for name, value in losses.items()},
            "rng": dict(rng_state),
            "epoch": epoch,
            "batch": batch,
        }
        atomic_save(content, path)
        where = str(path)
    raise NonFiniteLossError(
        f"epoch {epoch}, batch {batch}: {', '.join(names)} not finite for images {image_ids}; stopped before the "
        f"optimizer step. Batch, weights and random state are in {where}. Lower --lr, or check these images"
    )
