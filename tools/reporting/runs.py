"""What an output folder holds, read as far as it is there; what is not there is remembered with the reason."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from datasets import CocoDetection, DatasetError, build_dataset
from datasets.coco_eval import ClassResult, per_class_results
from models import list_models
from util.checkpoint import load_checkpoint
from util.config import resolve_options
from util.curves import read_log, run_names
from util.environment import ENVIRONMENT_FILE
from util.errors import OptionError
from util.logger import read_json_lines
from util.options import build_parser

from .errors import Found, Truth

PRECISION = "precision"
DETECTIONS = "detections"
DATA = "data"
OPTIONS = "options"
ENVIRONMENT = "environment"
EVALUATE_HINT = "pass --evaluate to make it from the checkpoint"


@dataclass(eq=False)
class RunFiles:
    """One output folder of main.py.

    Attributes:
        name: short, different from that of the other runs.
        folder: where it lies.
        records: log lines of the epochs, in order.
        evaluation: the newest log line of `--eval`, empty without one.
        args: effective options; None when there is no usable config.py.
        starts: one entry per start of the program.
        precision: arrays of the last evaluation, see `util.reports.save_precision`.
        detections: image id -> (n, 6) left, top, width, height, score, category id.
        data: the validation data.
        missing: what could not be read -> a sentence that says why.
    """

    name: str
    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    args: argparse.Namespace | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    precision: dict[str, Any] | None = None
    detections: dict[int, NDArray[np.float64]] | None = None
    data: CocoDetection | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def why_missing(self, *parts: str) -> str:
        """Return the reasons why some parts could not be read, empty when all are there."""
        return " ".join(dict.fromkeys(self.missing[part] for part in parts if part in self.missing))


def read_runs(folders: Sequence[Path], *, coco_path: str | None = None) -> list[RunFiles]:
    """Read output folders.

    Args:
        folders: each has a log.txt.
        coco_path: where the data lies now, in place of the `coco_path` of the options.

    Raises:
        OptionError, CheckpointError: a file is there and damaged.
    """
    return [_read_run(name, folder, coco_path) for name, folder in zip(run_names(folders), folders, strict=True)]


def read_options(folder: Path) -> argparse.Namespace | None:
    """Return the effective options of a run, None without config.py.

    Raises:
        OptionError: an option in it is unknown or has a wrong value.
    """
    path = folder / "config.py"
    if not path.is_file():
        return None
    return resolve_options(build_parser(list_models()), ["--config_file", str(path)])[0]


def class_results(run: RunFiles) -> list[ClassResult]:
    """Compute the figures of every class from the stored precision; needs the data for names and counts."""
    assert run.precision is not None and run.data is not None
    params = run.precision["params"]
    evaluator = COCOeval(iouType="bbox")
    evaluator.cocoGt = run.data.coco
    evaluator.params.imgIds, evaluator.params.catIds = params["imgIds"], params["catIds"]
    evaluator.eval = {name: run.precision[name].numpy() for name in ("precision", "recall")}
    return per_class_results(evaluator)


def objects_and_detections(run: RunFiles) -> dict[int, tuple[Truth, Found]]:
    """Return the objects and the detections of every evaluated image, by image id."""
    assert run.detections is not None and run.data is not None
    coco = run.data.coco
    # Images without a detection are not in that file.
    evaluated = run.precision["params"]["imgIds"] if run.precision is not None else run.data.ids
    pairs = {}
    for image_id in evaluated:
        annotations = coco.imgToAnns.get(image_id, [])
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        categories = np.array([a["category_id"] for a in annotations], dtype=np.int64)
        truth = Truth(boxes, categories, np.array([a["iscrowd"] for a in annotations], dtype=bool))
        rows = run.detections.get(image_id, np.zeros((0, 6)))
        pairs[image_id] = (truth, Found(rows[:, :4], rows[:, 5].astype(np.int64), rows[:, 4]))
    return pairs


def _read_run(name: str, folder: Path, coco_path: str | None) -> RunFiles:
    run = RunFiles(name, folder, records=read_log(folder))
    evaluations = [line for line in read_json_lines(folder / "log.txt") if "epoch" not in line]
    run.evaluation = evaluations[-1] if evaluations else {}
    run.args = read_options(folder)
    if run.args is None:
        run.missing[OPTIONS] = f"{name} has no config.py."
    _read_environment(run)
    _read_evaluation(run)
    _open_data(run, coco_path)
    return run


def _read_environment(run: RunFiles) -> None:
    path = run.folder / ENVIRONMENT_FILE
    if path.is_file():
        run.starts = read_json_lines(path)
    else:
        run.missing[ENVIRONMENT] = f"{run.name} has no {ENVIRONMENT_FILE}; runs of older versions did not write it."


def _read_evaluation(run: RunFiles) -> None:
    # Training writes into eval/, an evaluation alone into the folder itself.
    precision = _first_file(run.folder, "eval/latest.pth", "eval.pth")
    if precision is None:
        run.missing[PRECISION] = f"{run.name} has no eval/latest.pth: {EVALUATE_HINT}."
    else:
        run.precision = load_checkpoint(precision)
    detections = _first_file(run.folder, "eval/detections.json", "detections.json")
    if detections is None:
        run.missing[DETECTIONS] = f"{run.name} has no eval/detections.json: {EVALUATE_HINT}."
    else:
        run.detections = _read_detections(detections)


def _read_detections(path: Path) -> dict[int, NDArray[np.float64]]:
    rows: Mapping[int, list[list[float]]] = defaultdict(list)
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            rows[entry["image_id"]].append([*entry["bbox"], entry["score"], entry["category_id"]])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise OptionError(f"{path} is no COCO results file ({error}): remove it and pass --evaluate") from error
    return {image_id: np.array(values, dtype=np.float64).reshape(-1, 6) for image_id, values in rows.items()}


def _open_data(run: RunFiles, coco_path: str | None) -> None:
    if run.args is None:
        run.missing[DATA] = run.missing[OPTIONS]
        return
    options = argparse.Namespace(**{**vars(run.args), "coco_path": coco_path or run.args.coco_path})
    try:
        run.data = build_dataset("val", options)
    except DatasetError as error:
        run.missing[DATA] = f"The data of {run.name} cannot be read ({error}); --coco_path says where it lies now."


def _first_file(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
