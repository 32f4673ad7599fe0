"""Which curves a run has, and their points from its log lines; how they are drawn is the business of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .logger import read_json_lines


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: what it shows; empty when the panel's title says it.
        name: entry of the log line; `epoch_time` is turned into seconds.
        style: solid "-", dashed "--" or dotted ":".
        index: place in the entry when that is a list of AP figures, which are shown in percent.
    """

    label: str
    name: str
    style: str = "-"
    index: int | None = None

    def points(self, records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
        """Return (epoch, value) of the log lines that have this entry, without infinite and missing (-1) figures."""
        values = [(record["epoch"], self._value(record)) for record in records]
        return [(epoch, value) for epoch, value in values if value is not None and math.isfinite(value)]

    def _value(self, record: Mapping[str, Any]) -> float | None:
        value = record.get(self.name)
        if value is None:
            return None
        if self.name == "epoch_time":
            return read_duration(value)
        if self.index is None:
            return float(value)
        # pycocotools gives -1 where the data has no such object.
        return 100 * value[self.index] if self.index < len(value) and value[self.index] >= 0 else None


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Attributes:
        title: what they show, with the unit.
        lines: the curves.
        from_zero: the axis starts at zero.
    """

    title: str
    lines: tuple[Line, ...]
    from_zero: bool = False


def _both(title: str, name: str) -> Panel:
    return Panel(title, (Line("train", f"train_{name}"), Line("val", f"test_{name}", "--")))


def _figures(title: str, *labels_and_places: tuple[str, int]) -> Panel:
    styles = zip(labels_and_places, ("-", "--", ":"), strict=True)
    return Panel(title, tuple(Line(lb, "test_coco_eval_bbox", st, i) for (lb, i), st in styles), from_zero=True)


PANELS = {
    "loss": _both("weighted loss", "loss"),
    "class_error": _both("class error (%)", "class_error"),
    "boxes": Panel(
        "box losses on val, weighted", (Line("bbox", "test_loss_bbox"), Line("giou", "test_loss_giou", ":"))
    ),
    "ap": _figures("average precision on val (%)", ("AP", 0), ("AP50", 1), ("AP75", 2)),
    "ce": _both("classification loss, weighted", "loss_ce"),
    "bbox": _both("L1 box loss, weighted", "loss_bbox"),
    "giou": _both("GIoU loss, weighted", "loss_giou"),
    "denoising": Panel(
        "denoising losses in training, weighted",
        (
            Line("ce", "train_tgt_loss_ce"),
            Line("bbox", "train_tgt_loss_bbox", "--"),
            Line("giou", "train_tgt_loss_giou", ":"),
        ),
    ),
    "sizes": _figures("AP by object size on val (%)", ("small", 3), ("medium", 4), ("large", 5)),
    "lr": Panel("learning rate", (Line("", "train_lr"),), from_zero=True),
    "grad_norm": Panel("gradient norm before clipping", (Line("", "train_grad_norm"),), from_zero=True),
    "speed": Panel("images per second in training", (Line("", "train_images_per_second"),), from_zero=True),
    "time": Panel("seconds per epoch, evaluation included", (Line("", "epoch_time"),), from_zero=True),
    "instability": Panel(
        "queries per val image with another object than an epoch before",
        (Line("", "test_instability"),),
        from_zero=True,
    ),
    "memory": Panel("peak memory so far (MiB)", (Line("", "train_peak_memory_mib"),), from_zero=True),
}
DEFAULT_PANELS = ("loss", "class_error", "boxes", "ap")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log lines of a run that belong to an epoch; of an epoch written twice the later one.

    Raises:
        FileNotFoundError: the folder has no log.txt.
        OptionError: a line is no JSON.
    """
    by_epoch = {record["epoch"]: record for record in read_json_lines(folder / "log.txt") if "epoch" in record}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name runs after their folders, with as many parent folders as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_duration(text: str) -> float:
    """Return the seconds of h:mm:ss, or of official lines' "1 day, h:mm:ss"."""
    days, _, clock = text.rpartition(", ")
    hours, minutes, seconds = (float(part) for part in clock.split(":"))
    return (int(days.split()[0]) if days else 0) * 86400.0 + hours * 3600 + minutes * 60 + seconds
