"""COCO average precision over any number of ranks, each image counted once.

Detections stay arrays until faster-coco-eval matches them, whose compiled loops give pycocotools' numbers; figures and
tables are pycocotools' own.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCOeval_faster
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from util.distributed import all_gather_object

from .annotations import DatasetError

_log = logging.getLogger(__name__)


class CocoEvaluator:
    """Collects detections and computes the 12 COCO figures of the images it was given.

    ``update`` for every batch, then ``synchronize_between_processes``, ``accumulate`` and ``summarize``. All ranks
    exchange their detections and get the same figures. An image that several ranks saw counts once, for the lowest.

    Args:
        coco_gt: ground truth.
        iou_types: ("bbox",).

    Attributes:
        coco_eval: per IoU type pycocotools' evaluator; ``coco_eval["bbox"].stats`` holds the 12 figures after
            `summarize`, ``.eval`` the precision arrays after `accumulate`. Its outcome per image stays empty.
        img_ids: images evaluated; those of all ranks after `synchronize_between_processes`.

    Raises:
        DatasetError: an IoU type other than bbox.
    """

    def __init__(self, coco_gt: COCO, iou_types: Sequence[str]) -> None:
        if list(iou_types) != ["bbox"]:
            raise DatasetError(f"boxes can be evaluated, got {list(iou_types)}: pass iou_types=('bbox',)")
        self.coco_gt = coco_gt
        self.iou_types = list(iou_types)
        self.coco_eval = {iou_type: COCOeval(iouType=iou_type) for iou_type in self.iou_types}
        for evaluator in self.coco_eval.values():
            evaluator.cocoGt = coco_gt
            evaluator.params.catIds = sorted(coco_gt.getCatIds())
        self.img_ids: list[int] = []
        self._detections: dict[int, NDArray[np.float64]] = {}
        self._merged: dict[int, NDArray[np.float64]] = {}
        self._is_synchronized = False

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the detections of some images; those of an image seen before are replaced.

        Args:
            predictions: image id -> ``boxes`` (N, 4) xyxy in pixels of the original picture, ``scores`` (N,),
                ``labels`` (N,) category ids. N may be 0: the image still counts.

        Raises:
            DatasetError: an image id that the ground truth does not have.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self.coco_gt.imgs:
                raise DatasetError(f"detections for image id {image_id}, which the annotation file does not list")
            self._detections[int(image_id)] = _as_rows(prediction)
        self._is_synchronized = False

    def synchronize_between_processes(self) -> None:
        """Collect the detections of all ranks."""
        image_ids = np.array(list(self._detections), dtype=np.int64)
        counts = np.array([len(rows) for rows in self._detections.values()], dtype=np.int64)
        rows = np.concatenate([*self._detections.values(), np.zeros((0, 6))])
        gathered = all_gather_object((image_ids, counts, rows))
        self._merged = {}
        for ids_of_rank, counts_of_rank, rows_of_rank in gathered:
            parts = np.split(rows_of_rank, np.cumsum(counts_of_rank)[:-1]) if len(counts_of_rank) else []
            for image_id, part in zip(ids_of_rank.tolist(), parts, strict=True):
                self._merged.setdefault(image_id, part)
        self.img_ids = sorted(self._merged)
        for evaluator in self.coco_eval.values():
            evaluator.params.imgIds = self.img_ids
        self._is_synchronized = True

    def accumulate(self) -> None:
        """Match detections and objects and compute precision and recall; merges the ranks first if need be."""
        if not self._is_synchronized:
            self.synchronize_between_processes()
        for evaluator in self.coco_eval.values():
            evaluator.eval = _precision(self.coco_gt, self._merged, evaluator.params)

    def summarize(self) -> str:
        """Compute the 12 figures, ``coco_eval[...].stats``, and return and log pycocotools' table of them."""
        tables = []
        for iou_type, evaluator in self.coco_eval.items():
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                evaluator.summarize()
            tables.append(f"IoU metric: {iou_type}\n{printed.getvalue().rstrip()}")
        table = "\n".join(tables)
        _log.info("%s", table)
        return table

    def gather_detections(self, most: int = 100) -> list[tuple[int, list[list[float]]]]:
        """Collect the detections of all ranks; every rank must call it.

        Args:
            most: detections kept per image, those with the highest scores.

        Returns:
            Per image, by id: (image id, rows of left, top, width, height in pixels, score, category id), best first.
        """
        if not self._is_synchronized:
            self.synchronize_between_processes()
        best = {i: rows[np.argsort(-rows[:, 4], kind="stable")[:most]] for i, rows in self._merged.items()}
        return [(image_id, best[image_id].tolist()) for image_id in self.img_ids]


@dataclass(frozen=True)
class ClassResult:
    """Average precision of one category; nan where the ground truth has no object of it.

    Attributes:
        category_id, name: the category.
        num_objects: objects in the evaluated images, crowd regions left out.
        ap, ap50, ap75: over IoU 0.5 to 0.95, at 0.5 and at 0.75, in [0, 1].
        ar100: average recall with 100 detections per image.
    """

    category_id: int
    name: str
    num_objects: int
    ap: float
    ap50: float
    ap75: float
    ar100: float


def per_class_results(evaluator: COCOeval) -> list[ClassResult]:
    """Read the figures of every category from an evaluator after ``accumulate``, in the order of their ids."""
    coco_gt, params = evaluator.cocoGt, evaluator.params
    # Axes: IoU thresholds, recall thresholds, K categories, areas (0 = all), most detections (-1 = 100).
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    recall = evaluator.eval["recall"][:, :, 0, -1]
    at = {iou: int(np.argmin(np.abs(params.iouThrs - iou))) for iou in (0.5, 0.75)}
    images = set(params.imgIds)
    results = []
    for k, category_id in enumerate(params.catIds):
        annotations = coco_gt.loadAnns(coco_gt.getAnnIds(catIds=[category_id], iscrowd=False))
        results.append(
            ClassResult(
                category_id,
                coco_gt.cats[category_id]["name"],
                sum(annotation["image_id"] in images for annotation in annotations),
                _mean(precision[:, :, k]),
                _mean(precision[at[0.5], :, k]),
                _mean(precision[at[0.75], :, k]),
                _mean(recall[:, k]),
            )
        )
    return results


def format_per_class_table(results: Iterable[ClassResult]) -> str:
    """Lay out per-class figures as a text table, in percent; categories without objects show a dash."""
    rows: list[tuple[str, ...]] = [("id", "class", "objects", "AP", "AP50", "AP75", "AR100")]
    for result in results:
        figures = (result.ap, result.ap50, result.ap75, result.ar100)
        percent = ["-" if np.isnan(figure) else f"{100 * figure:.1f}" for figure in figures]
        rows.append((str(result.category_id), result.name, str(result.num_objects), *percent))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 1 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    )


def _mean(figures: NDArray[np.float64]) -> float:
    # pycocotools marks what does not exist by -1.
    known = figures[figures > -1]
    return float(known.mean()) if known.size else float("nan")


def _as_rows(prediction: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Detections of one image as (N, 6) rows: left, top, width, height, score, category id."""
    columns = [prediction["boxes"], prediction["scores"][:, None], prediction["labels"][:, None]]
    rows = torch.cat([column.detach().double() for column in columns], dim=1).cpu().numpy()
    rows[:, 2:4] -= rows[:, :2]
    # Differs from official: float32 corners carry errors up to 1e-4 pixels, which decide where an overlap lies on a
    # threshold (0.001 AP on 100 COCO images). Thousandths of a pixel are the same for every precision of the input.
    rows[:, :4] = rows[:, :4].round(3)
    return rows


class _Detections:
    """Detections of many images in the form in which faster-coco-eval asks for them, without an index by image.

    Args:
        detections: image id -> (N, 6) rows as of `_as_rows`.
        category_ids: those evaluated; detections of other categories are left out.
    """

    def __init__(self, detections: Mapping[int, NDArray[np.float64]], category_ids: Sequence[int]) -> None:
        image_ids = np.repeat(list(detections), [len(rows) for rows in detections.values()]).astype(np.int64)
        rows = np.concatenate([*detections.values(), np.zeros((0, 6))])
        known = np.isin(rows[:, 5], category_ids)
        self._columns = (image_ids[known], rows[known])

    def getAnnIds(self, **_: Any) -> None:
        """Ask for nothing: `loadAnns` gives all."""

    def loadAnns(self, _: None) -> list[dict[str, Any]]:
        """Return one entry per detection; they live no longer than the matching."""
        image_ids, rows = self._columns
        area = rows[:, 2] * rows[:, 3]
        columns = (image_ids, rows[:, 5].astype(np.int64), rows[:, :4], area, rows[:, 4])
        return [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": size, "score": score}
            for i, (image, category, box, size, score) in enumerate(zip(*(c.tolist() for c in columns), strict=True), 1)
        ]


def _precision(coco_gt: COCO, detections: Mapping[int, NDArray[np.float64]], params: Any) -> dict[str, Any]:
    """Compute what pycocotools' ``accumulate`` computes: precision, recall, scores, counts, params."""
    evaluator = COCOeval_faster(iouType=params.iouType, print_function=_log.debug)
    evaluator.cocoGt, evaluator.cocoDt = coco_gt, _Detections(detections, params.catIds)
    evaluator.params.imgIds, evaluator.params.catIds = params.imgIds, params.catIds
    with _collector_paused():
        evaluator.evaluate()
        evaluator.accumulate()
    wanted = ("precision", "recall", "scores", "counts", "date")
    return {"params": params, **{name: evaluator.eval[name] for name in wanted}}


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    # An entry per detection, none in a cycle, makes python search the whole process for cycles again and again.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
