"""The evaluator against pycocotools on drawn cases: crowds, ties, area ranges, empty images, many detections, ranks."""

from __future__ import annotations

import contextlib
import gc
import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets import coco_eval
from datasets.coco import index_annotations
from datasets.coco_eval import CocoEvaluator
from util.reports import save_precision

Predictions = dict[int, dict[str, torch.Tensor]]


def reference(coco: COCO, predictions: Predictions) -> COCOeval:
    """Evaluate with pycocotools alone."""
    results: list[dict[str, Any]] = []
    for image_id, prediction in predictions.items():
        boxes = prediction["boxes"].double().clone()
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(boxes.tolist(), prediction["scores"].tolist(), prediction["labels"].tolist(), strict=True)
        results += [{"image_id": image_id, "bbox": b, "score": s, "category_id": c} for b, s, c in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.params.imgIds = sorted(predictions)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def drawn_case(
    *, crowd: float = 0.0, score_levels: int = 0, per_image: int = 30, sides: tuple[float, float] = (4, 250)
) -> tuple[COCO, Predictions]:
    """Draw 12 images of 3 categories; of the third only objects, of the fourth only detections."""
    random = np.random.RandomState(3)

    def boxes(count: int) -> NDArray[np.float64]:
        extent = np.exp(random.uniform(np.log(sides[0]), np.log(sides[1]), (count, 2)))
        # Eighths of a pixel are exact in float32, so that both sides see the same numbers.
        return (np.concatenate((random.uniform(0, 200, (count, 2)), extent), axis=1) * 8).round() / 8

    annotations: list[dict[str, Any]] = []
    predictions: Predictions = {}
    for image_id in range(1, 13):
        truth = boxes(0 if image_id in (4, 5) else random.randint(1, 9))
        categories = random.choice([1, 2, 7], len(truth))
        for box, category in zip(truth.tolist(), categories.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box}
            # Areas of masks, smaller than the boxes.
            annotations.append(entry | {"area": 0.6 * box[2] * box[3], "iscrowd": int(random.rand() < crowd)})
        count = 0 if image_id in (5, 6) else per_image
        source = random.randint(max(len(truth), 1), size=count if len(truth) else 0)
        found = np.concatenate(((truth[source] * random.normal(1, 0.08, (len(source), 4)) * 8).round() / 8, boxes(5)))
        labels = np.concatenate((categories[source], random.choice([1, 2, 9], 5))) if count else np.zeros(0)
        found = np.maximum(found[: len(labels)], 0.125)
        scores = random.rand(len(found))
        if score_levels:
            scores = np.ceil(scores * score_levels) / score_levels
        found[:, 2:] += found[:, :2]
        predictions[image_id] = {
            "boxes": torch.from_numpy(found),
            "scores": torch.from_numpy(scores),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }
    images = [{"id": image_id, "width": 400, "height": 400} for image_id in predictions]
    names = [{"id": number, "name": str(number)} for number in (1, 2, 7, 9)]
    return index_annotations({"images": images, "categories": names, "annotations": annotations}), predictions


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "crowd regions": {"crowd": 0.4},
    "tied scores": {"score_levels": 3},
    "one score": {"score_levels": 1, "crowd": 0.2},
    "more than 100 detections": {"per_image": 330},
    "small objects": {"sides": (4, 40)},
    "large objects": {"sides": (90, 260)},
}


@pytest.mark.parametrize("case", CASES)
def test_figures_and_curves_are_those_of_pycocotools(case: str) -> None:
    coco, predictions = drawn_case(**CASES[case])
    expected = reference(coco, predictions)
    evaluator = CocoEvaluator(coco, ("bbox",))
    for image_id, prediction in predictions.items():
        evaluator.update({image_id: prediction})
    evaluator.accumulate()
    assert gc.isenabled()
    table = evaluator.summarize()
    found = evaluator.coco_eval["bbox"]
    assert expected.stats[0] > 0.01
    # The same comparisons on the same numbers; only the order of float64 sums may differ.
    np.testing.assert_allclose(found.stats, expected.stats, rtol=0, atol=1e-12)
    for name in ("precision", "recall", "scores"):
        assert found.eval[name].shape == expected.eval[name].shape
        np.testing.assert_allclose(found.eval[name], expected.eval[name], rtol=0, atol=1e-12)
    assert list(found.eval["counts"]) == list(expected.eval["counts"])
    assert len(table.splitlines()) == 13


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_exchange_arrays_and_agree(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    coco, predictions = drawn_case(crowd=0.2, score_levels=4)
    expected = reference(coco, predictions)
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return list(sent)

    monkeypatch.setattr(coco_eval, "all_gather_object", gather)
    for rank in range(world_size):
        evaluator = CocoEvaluator(coco, ("bbox",))
        evaluator.update({i: predictions[i] for i in sorted(predictions)[rank::world_size]})
        evaluator.synchronize_between_processes()
    assert all(isinstance(part, np.ndarray) for value in sent for part in value)
    evaluator.accumulate()
    evaluator.summarize()
    # Tied scores are ranked by image, whichever rank an image came from.
    np.testing.assert_allclose(evaluator.coco_eval["bbox"].stats, expected.stats, rtol=0, atol=1e-12)


def test_precision_curves_can_be_saved(tmp_path: Any) -> None:
    coco, predictions = drawn_case()
    evaluator = CocoEvaluator(coco, ("bbox",))
    evaluator.update(predictions)
    evaluator.accumulate()
    save_precision(evaluator.coco_eval["bbox"].eval, tmp_path / "eval.pth")
    content = torch.load(tmp_path / "eval.pth", weights_only=True)
    assert content["precision"].shape == (10, 101, 4, 4, 3)
    assert content["params"]["imgIds"] == sorted(predictions)
