"""Evaluates the checkpoint of an output folder that lacks what a report shows."""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets.coco_names import COCO_NAMES
from tools.training import build_run, evaluate_run
from util.checkpoint import LATEST
from util.distributed import init_distributed_mode, pick_device
from util.errors import OptionError
from util.resume import restore

from .runs import read_options


def evaluate_folder(folder: Path, *, coco_path: str | None = None, device: str | None = None) -> None:
    """Evaluate `checkpoint.pth` and write `eval/latest.pth` and `eval/detections.json`, as training does.

    Args:
        folder: output folder of main.py.
        coco_path: where the data lies now; None takes that of the options.
        device: where to compute; None takes that of the options.

    Raises:
        OptionError: there is no config.py. CheckpointError, DatasetError: checkpoint or data cannot be read.
    """
    options = read_options(folder)
    if options is None:
        raise OptionError(f"{folder} has no config.py: evaluate the checkpoint with main.py --eval")
    changes = {"eval": True, "resume": str(folder / LATEST), "save_results": False, "output_dir": str(folder)}
    args = argparse.Namespace(**{**vars(options), **changes})
    args.coco_path, args.device = coco_path or args.coco_path, device or args.device
    init_distributed_mode(args)
    run = build_run(args, pick_device(args.device, args.local_rank), folder)
    restore(run.state, args, folder, coco_names=COCO_NAMES)
    evaluate_run(run, [folder / "eval" / "latest.pth"])
