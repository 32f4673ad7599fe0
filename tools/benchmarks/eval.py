"""Time COCO evaluation: ours from `CocoEvaluator.update` to the 12 figures, against pycocotools.

The baseline does what official evaluators do: one Python dict per detection, ``COCO.loadRes``, ``COCOeval``. Ground
truth and detections are drawn: 80 unevenly frequent categories, 7 objects per image, of which detections are noisy
copies among others. The 12 figures of both sides are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco import index_annotations
from datasets.coco_eval import CocoEvaluator

from .compare import add_common_arguments, compare, report

CATEGORIES, OBJECTS, CROWD_SHARE = 80, 7.3, 0.01
TOLERANCE = 1e-9
Predictions = dict[int, dict[str, torch.Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    add_common_arguments(parser)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument(
        "--memory", choices=("ours", "baseline"), help="only run one side once and tell its memory and time"
    )


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit code."""
    torch.set_num_threads(args.threads)
    coco, predictions = draw_case(args.images, args.detections)
    if args.memory:
        before, start = peak_mib(), time.perf_counter()
        figures = {"ours": evaluate_ours, "baseline": evaluate_baseline}[args.memory](coco, predictions)
        took = time.perf_counter() - start
        print(f"{args.memory}: AP {figures[0]:.4f}, {took:.1f} s, peak memory {before} MiB before, {peak_mib()} after")
        return 0
    outcomes = {}

    def run_baseline() -> None:
        outcomes["baseline"] = evaluate_baseline(coco, predictions)

    def run_ours() -> None:
        outcomes["ours"] = evaluate_ours(coco, predictions)

    ratio = compare(
        f"COCO evaluation, {args.images} images x {args.detections} detections",
        {"pycocotools": run_baseline, "CocoEvaluator": run_ours},
        rounds=args.rounds,
        clock=args.clock,
        required=5,
        aim=10,
    )
    difference = float(np.abs(outcomes["baseline"] - outcomes["ours"]).max())
    if difference > TOLERANCE:
        sys.exit(f"the 12 figures differ by up to {difference:.2g}: the times are not comparable")
    print(f"12 figures equal to {difference:.1g}, AP {outcomes['ours'][0]:.4f}")
    report([ratio], args.json)
    return 0


def draw_case(num_images: int, num_detections: int) -> tuple[COCO, Predictions]:
    """Draw ground truth and detections; all coordinates are multiples of 1/8, exact in every precision."""
    random = np.random.RandomState(0)
    frequency = np.arange(1, CATEGORIES + 1) ** -0.8
    frequency /= frequency.sum()
    annotations: list[dict[str, Any]] = []
    predictions: Predictions = {}
    for image_id in range(1, num_images + 1):
        count = random.poisson(OBJECTS)
        boxes_xywh = draw_boxes(random, count)
        categories = 1 + random.choice(CATEGORIES, 3, p=frequency)[random.randint(3, size=count)]
        crowd = random.rand(count) < CROWD_SHARE
        for box, category, is_crowd in zip(boxes_xywh.tolist(), categories.tolist(), crowd.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": 0.7 * box[2] * box[3],
                    "iscrowd": int(is_crowd),
                }
            )
        copies = min(3 * count, num_detections // 2)
        source = random.randint(max(count, 1), size=copies)
        found = to_eighths(boxes_xywh[source] * random.normal(1, 0.07, (copies, 4)))
        others = num_detections - copies
        boxes = np.concatenate((found, draw_boxes(random, others)))
        boxes[:, 2:] += boxes[:, :2]
        labels = np.concatenate((categories[source], 1 + random.choice(CATEGORIES, others, p=frequency)))
        scores = random.rand(num_detections) * np.repeat((1.0, 0.4), (copies, others))
        predictions[image_id] = {
            "boxes": torch.from_numpy(boxes).float(),
            "scores": torch.from_numpy(scores).float(),
            "labels": torch.from_numpy(labels),
        }
    images = [{"id": image_id, "width": 640, "height": 480} for image_id in predictions]
    names = [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)]
    return index_annotations({"images": images, "categories": names, "annotations": annotations}), predictions


def draw_boxes(random: np.random.RandomState, count: int) -> NDArray[np.float64]:
    """Draw (count, 4) boxes: left, top, width, height in pixels, sides from 8 to 300 evenly on a log scale."""
    sides = np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))
    return to_eighths(np.concatenate((random.uniform(0, 500, (count, 2)), sides), axis=1))


def to_eighths(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to multiples of 1/8 pixel, at least one."""
    return np.maximum((values * 8).round(), 1) / 8


def evaluate_baseline(coco: COCO, predictions: Predictions) -> NDArray[np.float64]:
    """Compute the 12 figures with pycocotools from one dict per detection."""
    results: list[dict[str, Any]] = []
    for image_id, prediction in predictions.items():
        boxes_xywh = prediction["boxes"].clone()
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        columns = zip(boxes_xywh.tolist(), prediction["scores"].tolist(), prediction["labels"].tolist(), strict=True)
        results.extend(
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score} for box, score, label in columns
        )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def evaluate_ours(coco: COCO, predictions: Predictions) -> NDArray[np.float64]:
    """Compute the 12 figures as `engine.evaluate` does, image after image."""
    evaluator = CocoEvaluator(coco, ("bbox",))
    for image_id, prediction in predictions.items():
        evaluator.update({image_id: prediction})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.coco_eval["bbox"].stats


def peak_mib() -> int:
    """Return the most memory this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
