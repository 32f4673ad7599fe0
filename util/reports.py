"""What a run leaves behind after every epoch: a log line, a table, precision curves, TensorBoard scalars."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .checkpoint import atomic_save, atomic_write
from .config import save_config
from .distributed import get_rank, is_main_process
from .errors import OptionError
from .logger import format_table, setup_logging
from .progress import format_seconds, peak_memory_mib

COCO_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_TABLE_LOSSES = (
    "loss",
    "loss_ce",
    "loss_bbox",
    "loss_giou",
    "tgt_loss_ce",
    "tgt_loss_bbox",
    "tgt_loss_giou",
    "class_error",
    "instability",
)


def prepare_output(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Path | None:
    """Make the output folder, start logging, write the effective configuration.

    Args:
        args: options; `output_dir` is made a full path.
        parser: all options.

    Returns:
        The folder, None without `--output_dir`.

    Raises:
        OptionError: the folder cannot be made or written to.
    """
    if not args.output_dir:
        setup_logging(None, rank=get_rank())
        return None
    folder = Path(args.output_dir).expanduser()
    args.output_dir = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        setup_logging(folder, rank=get_rank(), save_log=args.save_log)
        if is_main_process():
            save_config(args, parser, folder / "config.py")
    except OSError as error:
        raise OptionError(f"cannot write to --output_dir {folder}: {error.strerror}; choose another") from error
    return folder


def epoch_record(
    train_stats: Mapping[str, Any],
    test_stats: Mapping[str, Any],
    *,
    epoch: int,
    n_parameters: int,
    seconds: float,
) -> dict[str, Any]:
    """Build one line of `log.txt`, official names.

    Args:
        train_stats, test_stats: means by name; they get the prefixes `train_` and `test_`.
        epoch: the epoch trained.
        n_parameters: trainable parameters.
        seconds: how long training and evaluation took.
    """
    return {
        **{f"train_{name}": value for name, value in train_stats.items()},
        **{f"test_{name}": value for name, value in test_stats.items()},
        "epoch": epoch,
        "n_parameters": n_parameters,
        "epoch_time": format_seconds(seconds),
        "now_time": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
    }


def speed_stats(images: int, seconds: float) -> dict[str, float]:
    """Return what an epoch of training cost: seconds, images per second, most memory so far (MiB, this process)."""
    stats = {"seconds": seconds, "peak_memory_mib": peak_memory_mib()}
    # Nothing was left to train when the run had stopped after the last batch of the epoch.
    return stats | ({"images_per_second": images / seconds} if images else {})


def epoch_table(train_stats: Mapping[str, Any], test_stats: Mapping[str, Any]) -> str:
    """Lay out the main losses of training beside those of evaluation, and the six AP figures in percent."""
    rows = []
    for name in _TABLE_LOSSES:
        cells = [f"{stats[name]:.4f}" if name in stats else "-" for stats in (train_stats, test_stats)]
        if cells != ["-", "-"]:
            rows.append((name, *cells))
    figures = test_stats.get("coco_eval_bbox", ())
    # pycocotools gives -1 where the data has no such object.
    percent = [f"{100 * figure:.1f}" if figure >= 0 else "-" for figure in figures[:6]]
    rows += [(name, "", value) for name, value in zip(COCO_FIGURES, percent, strict=False)]
    return format_table(("", "train", "val"), rows)


def save_precision(evaluation: Mapping[str, Any], path: Path) -> None:
    """Write pycocotools' accumulated arrays (`eval.pth`), as tensors and plain values.

    Differs from official: no numpy arrays and no pycocotools object, so that the file loads with weights_only=True.

    Args:
        evaluation: `coco_eval["bbox"].eval`: `precision` (10 IoU, 101 recall, K, 4 areas, 3 maxDets), `recall`
            (10, K, 4, 3), `scores` (as precision), `counts`, `date`, `params`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    params = evaluation["params"]
    content = {
        "params": {
            "imgIds": [int(value) for value in params.imgIds],
            "catIds": [int(value) for value in params.catIds],
            "iouThrs": torch.as_tensor(params.iouThrs),
            "recThrs": torch.as_tensor(params.recThrs),
            "maxDets": [int(value) for value in params.maxDets],
            "areaRng": [[float(value) for value in pair] for pair in params.areaRng],
            "iouType": params.iouType,
        },
        "counts": [int(value) for value in evaluation["counts"]],
        "date": evaluation["date"],
        **{name: torch.as_tensor(evaluation[name]) for name in ("precision", "recall", "scores")},
    }
    atomic_save(content, path)


def save_detections(per_image: Iterable[tuple[int, Iterable[Sequence[float]]]], path: Path) -> None:
    """Write detections as a COCO results file, one line per image with detections.

    Args:
        per_image: (image id, rows of left, top, width, height in pixels, score, category id). Written to hundredths
            of a pixel and millionths of a score.
        path: the JSON file.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        separator = b"[\n"
        for image_id, rows in per_image:
            entries = [
                {
                    "image_id": image_id,
                    "category_id": int(category_id),
                    "bbox": [round(side, 2) for side in box],
                    "score": round(score, 6),
                }
                for *box, score, category_id in rows
            ]
            if entries:
                file.write(separator + json.dumps(entries, separators=(",", ":"))[1:-1].encode())
                separator = b",\n"
        file.write(b"\n]\n" if separator != b"[\n" else b"[]\n")

    atomic_write(write, path)


def record_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a log line for a tracker: `train_loss` as `train/loss`, the AP figures by name."""
    scalars: dict[str, float] = {}
    for name, value in record.items():
        prefix, _, rest = name.partition("_")
        if name.endswith("coco_eval_bbox"):
            scalars |= {f"{prefix}/{figure}": number for figure, number in zip(COCO_FIGURES, value, strict=True)}
        elif prefix in ("train", "test") and isinstance(value, (int, float)) and not name.endswith("_unscaled"):
            scalars[f"{prefix}/{rest}"] = value
    return scalars
