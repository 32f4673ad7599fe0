"""What each section of a report shows, as plain values; a section without data says why in one sentence."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models import list_models
from util.config import NOT_IN_CONFIG
from util.curves import PANELS, read_duration
from util.options import build_parser, model_defaults
from util.progress import format_seconds
from util.reports import COCO_FIGURES

from .charts import Chart, Series, line_chart
from .errors import KINDS, weigh_errors
from .pictures import worst_images
from .runs import DATA, DETECTIONS, ENVIRONMENT, OPTIONS, PRECISION, RunFiles, class_results, objects_and_detections

Section = dict[str, Any]
CURVE_GROUPS = {
    "Loss": ("loss", "ce", "bbox", "giou", "class_error"),
    "Denoising": ("denoising",),
    "Average precision": ("ap", "sizes"),
    "Rate, gradient, speed and memory": ("lr", "grad_norm", "speed", "time", "memory"),
}
KIND_TEXTS = {
    "classification": "box right, class wrong",
    "localisation": "class right, box off (IoU 0.1 to 0.5)",
    "both": "class wrong and box off",
    "duplicate": "a better detection has the object",
    "background": "nothing there (IoU below 0.1)",
    "missed": "no correct detection, and none that could be mended",
    "false positives": "all wrong detections together",
    "false negatives": "all objects without a correct detection",
}
_MOST_CLASS_CURVES = 12
_CLASS_CURVE_STEP = 4


def summary_section(runs: Sequence[RunFiles]) -> Section:
    """Return tiles with the headline of each run, and rows of figures with one cell per run."""
    tiles = []
    columns = []
    for run in runs:
        best = best_record(run)
        figures = best.get("test_coco_eval_bbox") or ()
        tiles.append({"name": run.name, "figures": _percents(figures)})
        columns.append(_summary_column(run, best))
    rows = [{"name": name, "cells": [column[name] for column in columns]} for name in columns[0]]
    return {"tiles": tiles, "rows": rows, "missing": ""}


def best_record(run: RunFiles) -> Mapping[str, Any]:
    """Return the log line of the epoch with the highest AP, else that of an evaluation, else nothing."""
    evaluated = [record for record in run.records if record.get("test_coco_eval_bbox")]
    return max(evaluated, key=lambda record: record["test_coco_eval_bbox"][0]) if evaluated else run.evaluation


def curve_section(runs: Sequence[RunFiles]) -> Section:
    """Return the charts of the log lines, by group."""
    groups = []
    for heading, names in CURVE_GROUPS.items():
        charts = [chart for name in names if (chart := _panel_chart(name, runs)) is not None]
        if charts:
            groups.append({"heading": heading, "charts": charts})
    return {"groups": groups, "missing": "" if groups else "The log has no line of a training epoch."}


def class_section(runs: Sequence[RunFiles]) -> Section:
    """Return a table of AP per class for every data set, with one column per run."""
    usable, missing = _usable(runs, PRECISION, DATA)
    tables = []
    for same_data in _by_data(usable):
        results = [class_results(run) for run in same_data]
        rows = []
        for versions in zip(*results, strict=True):
            cells = [{"ap": _percent(one.ap), "ap50": _percent(one.ap50)} for one in versions]
            rows.append({"name": versions[0].name, "objects": versions[0].num_objects, "cells": cells})
        tables.append({"runs": _numbered(runs, same_data), "rows": rows})
    return {"tables": tables, "missing": missing}


def precision_section(runs: Sequence[RunFiles]) -> Section:
    """Return the curve of precision over recall, the mean of the classes, and those of the commonest classes."""
    usable, missing = _usable(runs, PRECISION)
    numbered = _numbered(runs, usable)
    mean = [
        Series(_named(runs, run, f"IoU {iou:g}"), f"IoU {iou:g}", number, style, _precision_points(run, iou))
        for number, run in numbered
        for iou, style in ((0.5, "-"), (0.75, "--"), (0.9, ":"))
    ]
    chart = _precision_chart("precision-mean", "mean of the classes", mean)
    by_class = []
    for place, same_data in enumerate(_by_data([run for run in usable if run.data is not None])):
        results = [result for result in class_results(same_data[0]) if result.num_objects]
        for result in sorted(results, key=lambda result: -result.num_objects)[:_MOST_CLASS_CURVES]:
            series = [
                Series(_named(runs, run, f"IoU {iou:g}"), f"IoU {iou:g}", number, style, points[::_CLASS_CURVE_STEP])
                for number, run in _numbered(runs, same_data)
                for iou, style in ((0.5, "-"), (0.75, "--"))
                if (points := _precision_points(run, iou, result.category_id))
            ]
            name = f"precision-{place}-{result.category_id}"
            by_class.append(_precision_chart(name, f"{result.name} ({result.num_objects} objects)", series))
    return {"chart": chart, "by_class": [one for one in by_class if one], "missing": missing}


def error_section(runs: Sequence[RunFiles]) -> Section:
    """Return what each kind of error costs in every run."""
    usable, missing = _usable(runs, DETECTIONS, DATA)
    costs = [weigh_errors(objects_and_detections(run).values()) for run in usable]
    names = [*KINDS, "false positives", "false negatives"]
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "text": KIND_TEXTS[name],
            "cells": [{"gain": 100 * cost.gains[name], "count": cost.counts.get(name)} for cost in costs],
        }
        for name in names
    ]
    widest = max((cell["gain"] for row in rows[: len(KINDS)] for cell in row["cells"]), default=0.0)
    return {
        "runs": _numbered(runs, usable),
        "ap50": [_percent(cost.ap50) for cost in costs],
        "rows": rows if usable else [],
        "widest": max(widest, 0.1),
        "missing": missing,
    }


def image_section(runs: Sequence[RunFiles], *, count: int, min_score: float) -> Section:
    """Return the images with the worst detections, for every data set."""
    usable, missing = _usable(runs, DETECTIONS, DATA)
    groups = []
    for same_data in _by_data(usable):
        pairs = {run.name: objects_and_detections(run) for run in same_data}
        data = same_data[0].data
        assert data is not None
        images = worst_images(data, pairs, count=count, min_score=min_score)
        groups.append({"folder": str(data.folder.folder), "images": images, "runs": list(pairs)})
    return {"groups": groups, "min_score": min_score, "missing": missing}


def option_section(runs: Sequence[RunFiles]) -> Section:
    """Return every option with its default and its value in each run."""
    usable, missing = _usable(runs, OPTIONS)
    defaults = [_defaults(run.args) for run in usable if run.args is not None]
    rows = []
    for name in defaults[0] if defaults else ():
        values = [getattr(run.args, name) for run in usable]
        changed = [value != default[name] for value, default in zip(values, defaults, strict=True)]
        differs = any(value != values[0] for value in values)
        rows.append(
            {
                "name": name,
                "default": repr(defaults[0][name]),
                "cells": [{"text": repr(value), "changed": new} for value, new in zip(values, changed, strict=True)],
                "marked": differs if len(usable) > 1 else changed[0],
            }
        )
    return {"runs": _numbered(runs, usable), "rows": rows, "missing": missing}


def environment_section(runs: Sequence[RunFiles]) -> Section:
    """Return versions, device and commit of the newest start of each run."""
    usable, missing = _usable(runs, ENVIRONMENT)
    columns = [{"starts of the program": len(run.starts), **run.starts[-1]} for run in usable]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [{"name": name, "cells": [_text(column.get(name)) for column in columns]} for name in names]
    return {"runs": _numbered(runs, usable), "rows": rows, "missing": missing}


def _summary_column(run: RunFiles, best: Mapping[str, Any]) -> dict[str, str]:
    figures = _percents(best.get("test_coco_eval_bbox") or ())
    last = run.records[-1] if run.records else {}
    args = run.args
    epochs = f"{len(run.records)}" + (f" of {args.epochs}" if args is not None and run.records else "")
    seconds = [read_duration(record["epoch_time"]) for record in run.records if "epoch_time" in record]
    return {
        "model": "-" if args is None else args.modelname + (", with denoising" if args.use_dn else ""),
        "backbone": "-" if args is None else args.backbone,
        "trainable parameters": f"{last['n_parameters']:,}" if "n_parameters" in last else "-",
        "epochs in the log": epochs,
        "best epoch (by AP, counted from 0)": _text(best.get("epoch")),
        **{f"{name} in the best epoch (%)": figures.get(name, "-") for name in COCO_FIGURES[:6]},
        "AR100 in the best epoch (%)": figures.get("AR100", "-"),
        "AP in the last epoch (%)": _percents(last.get("test_coco_eval_bbox") or ()).get("AP", "-"),
        "time, all epochs": format_seconds(sum(seconds)) if seconds else "-",
        "time per epoch, median": format_seconds(statistics.median(seconds)) if seconds else "-",
        "images per second in training, median": _median(run, "train_images_per_second", "{:.1f}"),
        "peak memory (MiB)": _median(run, "train_peak_memory_mib", "{:.0f}", max),
    }


def _median(run: RunFiles, name: str, form: str, choose: Callable[[list[float]], float] = statistics.median) -> str:
    values = [record[name] for record in run.records if name in record]
    return form.format(choose(values)) if values else "-"


def _panel_chart(name: str, runs: Sequence[RunFiles]) -> Chart | None:
    panel = PANELS[name]
    series = [
        Series(_named(runs, run, line.label), line.label, number, line.style, line.points(run.records))
        for number, run in enumerate(runs)
        for line in panel.lines
    ]
    return line_chart(f"chart-{name}", panel.title, series, from_zero=panel.from_zero)


def _precision_chart(name: str, title: str, series: Sequence[Series]) -> Chart | None:
    return line_chart(name, title, series, x_label="recall", limits=(0.0, 1.0))


def _precision_points(run: RunFiles, iou: float, category_id: int | None = None) -> list[tuple[float, float]]:
    """Return (recall, precision) at one IoU, of a class or the mean of those that have objects."""
    assert run.precision is not None
    params = run.precision["params"]
    threshold = int(np.argmin(np.abs(params["iouThrs"].numpy() - iou)))
    # Axes: IoU, recall, classes, areas (0 = all), most detections (-1 = 100).
    curves = run.precision["precision"].numpy()[threshold, :, :, 0, -1]
    if category_id is not None:
        curves = curves[:, [params["catIds"].index(category_id)]]
    curves = curves[:, (curves > -1).all(axis=0)]
    if not curves.size:
        return []
    return list(zip(params["recThrs"].tolist(), curves.mean(axis=1).tolist(), strict=True))


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    actions = {action.dest: action.default for action in build_parser(list_models())._actions}
    own = model_defaults(args.modelname)
    return {name: own.get(name, default) for name, default in actions.items() if name not in NOT_IN_CONFIG}


def _usable(runs: Sequence[RunFiles], *parts: str) -> tuple[list[RunFiles], str]:
    """Return the runs that have all the parts, and why the others have not."""
    reasons = {run.name: run.why_missing(*parts) for run in runs}
    return [run for run in runs if not reasons[run.name]], " ".join(dict.fromkeys(filter(None, reasons.values())))


def _by_data(runs: Sequence[RunFiles]) -> list[list[RunFiles]]:
    """Group runs that were evaluated on the same pictures and classes."""
    groups: dict[Any, list[RunFiles]] = {}
    for run in runs:
        assert run.data is not None
        classes = tuple(run.precision["params"]["catIds"]) if run.precision is not None else ()
        groups.setdefault((run.data.folder.folder.resolve(), classes), []).append(run)
    return list(groups.values())


def _numbered(runs: Sequence[RunFiles], chosen: Sequence[RunFiles]) -> list[tuple[int, RunFiles]]:
    return [(number, run) for number, run in enumerate(runs) if run in chosen]


def _named(runs: Sequence[RunFiles], run: RunFiles, label: str) -> str:
    return f"{run.name} {label}".rstrip() if len(runs) > 1 or not label else label


def _percents(figures: Sequence[float]) -> dict[str, str]:
    return {name: _percent(figure) for name, figure in zip(COCO_FIGURES, figures, strict=False)}


def _percent(figure: float) -> str:
    # nan and pycocotools' -1: there is no such object.
    return f"{100 * figure:.1f}" if figure >= 0 else "-"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
