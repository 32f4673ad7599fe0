"""A run of main.py: data, model and state built from the options, then epochs or one evaluation."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from datasets import (
    EvalBatchSampler,
    TrainBatchSampler,
    build_data_loader,
    build_dataset,
    get_coco_api_from_dataset,
)
from datasets.coco_eval import CocoEvaluator, format_per_class_table, per_class_results
from engine import evaluate, train_one_epoch
from models import build_model
from models.inference import prepare_for_inference
from util.distributed import DelayedVote, all_gather_object, get_rank, is_main_process, wrap_model
from util.errors import OptionError
from util.instability import MatchingHistory
from util.logger import append_json_line
from util.plots import draw_examples, plot_logs
from util.reports import epoch_record, epoch_table, record_scalars, save_detections, save_precision, speed_stats
from util.run_state import RunState, build_run_state
from util.signals import StopRequested, StopSignals
from util.step import amp_dtype
from util.trackers import Trackers, open_trackers

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything one start of the program works with.

    Attributes:
        args: options; `num_classes` is filled in from the data.
        device: where to compute.
        folder: output folder, None writes nothing.
        model: the detector, wrapped when there are several processes; the bare one is `state.model`.
        criterion, postprocessors: as built.
        train_data, train_loader: None with `--eval`; train_sampler: the order.
        val_data, val_loader: for evaluation.
        state: what a checkpoint holds.
        stops: signals that ask for an end.
    """

    args: argparse.Namespace
    device: torch.device
    folder: Path | None
    model: nn.Module
    criterion: nn.Module
    postprocessors: dict[str, Any]
    train_data: Any
    train_loader: Any
    train_sampler: TrainBatchSampler | None
    val_data: Any
    val_loader: Any
    state: RunState
    stops: StopSignals


def build_run(
    args: argparse.Namespace, device: torch.device, folder: Path | None, stops: StopSignals | None = None
) -> Run:
    """Open the data and build model, optimizer and schedule.

    Args:
        args: options; `num_classes` is filled in.
        device: where to compute; folder: for output.
        stops: signals to obey; None obeys none.

    Raises:
        DatasetError: the data cannot be used. OptionError, CheckpointError: the model cannot be built.
    """
    val_data = build_dataset("val", args)
    train_data = None if args.eval else build_dataset("train", args)
    args.num_classes = val_data.num_classes
    place = {"rank": get_rank(), "world_size": args.world_size, "batch_size": args.batch_size}
    loading = {"num_workers": args.num_workers, "seed": args.seed}
    loading["pin_memory"] = args.pin_memory and device.type == "cuda"
    loading["size_multiple"] = args.size_bucket or 1
    sampler, train_loader = None, None
    if train_data is not None:
        groups = train_data.orientations() if args.aspect_ratio_grouping else None
        sampler = TrainBatchSampler(len(train_data), seed=args.seed, groups=groups, **place)
        train_loader = build_data_loader(train_data, batch_sampler=sampler, **loading)
    try:
        model, criterion, postprocessors = build_model(args)
        wrapped = wrap_model(model.to(device), device, find_unused_parameters=args.find_unused_params)
        state = build_run_state(model, device, args, val_data.class_names)
        state.category_ids = val_data.labels_to_categories(torch.arange(args.num_classes)).tolist()
    except ValueError as error:
        raise OptionError(str(error)) from error
    return Run(
        args=args,
        device=device,
        folder=folder,
        model=wrapped,
        criterion=criterion.to(device),
        postprocessors=postprocessors,
        train_data=train_data,
        train_loader=train_loader,
        train_sampler=sampler,
        val_data=val_data,
        val_loader=build_data_loader(val_data, batch_sampler=EvalBatchSampler(len(val_data), **place), **loading),
        state=state,
        stops=stops or StopSignals(),
    )


def train(run: Run) -> None:
    """Train from the restored position to the last epoch; save, evaluate and report after each."""
    args, state, folder = run.args, run.state, run.folder
    n_parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    _log.info(
        "%s: %d trainable parameters, epochs %d to %d", args.modelname, n_parameters, state.epoch, args.epochs - 1
    )
    if state.epoch >= args.epochs:
        _log.info("all %d epochs are done: nothing left to train", args.epochs)
        return
    with open_trackers(args, folder, resumed=state.epoch > 0 or state.batches_done > 0) as trackers:
        train_epochs(run, trackers, n_parameters)
    if folder and is_main_process():
        plot_logs([folder], folder / "curves.png")
        if args.log_instability:
            plot_logs([folder], folder / "instability.png", ["instability"])
        draw_predictions_of(run, folder / "predictions.png")


def train_epochs(run: Run, trackers: Trackers, n_parameters: int) -> None:
    """Train the epochs that are left; save, evaluate and report after each."""
    args, state, folder = run.args, run.state, run.folder
    matcher: Any = run.criterion.matcher
    history = MatchingHistory(matcher, folder) if args.log_instability else None
    while state.epoch < args.epochs:
        start, epoch = time.monotonic(), state.epoch
        # Saved before the evaluation, so that a crash there loses nothing.
        train_stats = train_epoch(run)
        # As official: the newest curves, and those of every fiftieth epoch.
        names = ["latest.pth", f"{epoch:03}.pth"] if epoch % 50 == 0 else ["latest.pth"]
        test_stats = evaluate_run(run, [folder / "eval" / name for name in names] if folder else [], history=history)
        if history is not None:
            test_stats |= history.finish_epoch(epoch)
        seconds = time.monotonic() - start
        record = epoch_record(train_stats, test_stats, epoch=epoch, n_parameters=n_parameters, seconds=seconds)
        if is_main_process():
            _log.info("epoch %d in %s\n%s", epoch, record["epoch_time"], epoch_table(train_stats, test_stats))
            if folder:
                append_json_line(folder / "log.txt", record)
            trackers.log_scalars(record_scalars(record), epoch)
            due = args.log_pictures_every and (state.epoch % args.log_pictures_every == 0 or state.epoch == args.epochs)
            if folder and trackers and due:
                draw_predictions_of(run, folder / "predictions.png")
                trackers.log_picture("predictions", folder / "predictions.png", epoch)


def draw_predictions_of(run: Run, path: Path) -> None:
    """Draw predictions of the evaluated model beside ground truth."""
    draw_examples(run.state.evaluated_model, run.postprocessors["bbox"], run.val_data, run.device, path)


def train_epoch(run: Run) -> dict[str, float]:
    """Train what is left of the epoch in progress, and save.

    Raises:
        StopRequested: any process got a signal; a step was finished and everything saved first.
    """
    args, state = run.args, run.state
    assert run.train_sampler is not None
    run.train_sampler.set_epoch(state.epoch, first_batch=state.batches_done)
    vote = DelayedVote(run.device)

    def after_step(batches_done: int) -> None:
        state.step += 1
        state.batches_done = batches_done
        # Clocks differ: that of process 0 decides for all.
        waited = time.monotonic() - state.saved_at
        overdue = 0 < args.checkpoint_minutes * 60 <= waited and is_main_process()
        stop, overdue = vote.cast(run.stops.received, int(overdue))
        if stop or overdue or (args.checkpoint_steps and state.step % args.checkpoint_steps == 0):
            state.save(run.folder, keep=args.keep_checkpoints)
        if stop:
            stop_training(run, stop)

    start, first_batch = time.monotonic(), state.batches_done
    with run.stops.deferred():
        stats = train_one_epoch(
            run.model,
            run.criterion,
            run.train_loader,
            state.optimizer,
            run.device,
            state.epoch,
            args=args,
            scaler=state.scaler,
            ema=state.ema,
            first_batch=state.batches_done,
            after_step=after_step,
        )
        images = (state.batches_done - first_batch) * state.images_per_batch
        stats |= speed_stats(images, time.monotonic() - start)
        state.finish_epoch(
            run.folder, lr_drop=args.lr_drop, interval=args.save_checkpoint_interval, keep=args.keep_checkpoints
        )
        stop = max(all_gather_object(run.stops.received))
        if stop:
            stop_training(run, stop)
    if args.skip_bad_images:
        bad = {image_id for ids in all_gather_object(run.train_data.bad_image_ids) for image_id in ids}
        stats["bad_images"] = len(bad)
    return stats


def stop_training(run: Run, number: int) -> NoReturn:
    """Say where training stopped, after saving, and stop.

    Raises:
        StopRequested: always.
    """
    state = run.state
    saved = f"saved in {run.folder}" if run.folder else "nothing is saved, for lack of --output_dir"
    _log.info("stopping after step %d (epoch %d, batch %d): %s", state.step, state.epoch, state.batches_done, saved)
    raise StopRequested(number)


def evaluate_only(run: Run) -> None:
    """Do what `--eval` asks for: one evaluation with curves, the table of classes and a log line.

    With `--amp` the weights are rounded once, and boxes are computed in float32.
    """
    curves = [run.folder / "eval.pth"] if run.folder else []
    dtype = amp_dtype(run.args.amp_dtype, run.device) if run.args.amp else torch.float32
    model = prepare_for_inference(run.state.evaluated_model, dtype, compile=run.args.compile)
    stats = evaluate_run(run, curves, per_class=True, model=model)
    if run.folder and is_main_process():
        append_json_line(run.folder / "log.txt", {f"test_{name}": value for name, value in stats.items()})


def evaluate_run(
    run: Run,
    curves: Sequence[Path],
    *,
    per_class: bool = False,
    history: MatchingHistory | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Evaluate a model and write precision curves and detections.

    Args:
        curves: files for the precision curves; `detections.json` is written beside the first.
        per_class: log the table of classes; history: takes the matches.
        model: by default the one in training or, with `--ema`, the average of its weights.
    """
    evaluator = CocoEvaluator(get_coco_api_from_dataset(run.val_data), ("bbox",))
    stats = evaluate(
        run.state.evaluated_model if model is None else model,
        run.criterion,
        run.postprocessors,
        run.val_loader,
        evaluator,
        run.device,
        args=run.args,
        to_categories=run.val_data.labels_to_categories,
        after_batch=history.add if history is not None else None,
    )
    detections = evaluator.gather_detections() if curves else []
    if is_main_process():
        if per_class:
            _log.info("per class\n%s", format_per_class_table(per_class_results(evaluator.coco_eval["bbox"])))
        for path in curves:
            path.parent.mkdir(exist_ok=True)
            save_precision(evaluator.coco_eval["bbox"].eval, path)
        if curves:
            save_detections(detections, curves[0].with_name("detections.json"))
    return stats
