"""The evaluator: known figures of real detections, ranks, empty images, per-class results."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO

from datasets import coco_eval
from datasets.annotations import DatasetError
from datasets.coco import index_annotations
from datasets.coco_eval import CocoEvaluator, format_per_class_table, per_class_results
from datasets.samplers import EvalBatchSampler
from tests.dataset_helpers import annotation, instances
from tests.golden_recipe import load_npz

Predictions = dict[int, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_npz("coco_eval.npz")


@pytest.fixture(scope="module")
def ground_truth(golden: dict[str, np.ndarray]) -> COCO:
    names = {"id": "id", "image_id": "image", "category_id": "category"} | {n: n for n in ("bbox", "area", "iscrowd")}
    columns = zip(*(golden[f"gt_{name}"].tolist() for name in names.values()), strict=True)
    return index_annotations(
        {
            "images": [{"id": image_id} for image_id in golden["image_ids"].tolist()],
            "categories": [{"id": i, "name": f"class {i}"} for i in golden["category_ids"].tolist()],
            "annotations": [dict(zip(names, row, strict=True)) for row in columns],
        }
    )


def real_predictions(golden: dict[str, np.ndarray], dtype: torch.dtype) -> Predictions:
    predictions = {}
    for image_id in golden["image_ids"].tolist():
        mine = golden["dt_image"] == image_id
        boxes = torch.from_numpy(golden["dt_bbox"][mine]).to(dtype)
        boxes[:, 2:] += boxes[:, :2]
        predictions[image_id] = {
            "boxes": boxes,
            "scores": torch.from_numpy(golden["dt_score"][mine]).to(dtype),
            "labels": torch.from_numpy(golden["dt_category"][mine]),
        }
    return predictions


def evaluated(ground_truth: COCO, batches: Iterable[Predictions]) -> CocoEvaluator:
    evaluator = CocoEvaluator(ground_truth, ("bbox",))
    for batch in batches:
        evaluator.update(batch)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def batches_of(predictions: Predictions, size: int) -> list[Predictions]:
    ids = list(predictions)
    return [{i: predictions[i] for i in ids[k : k + size]} for k in range(0, len(ids), size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_detections_get_their_known_figures(
    golden: dict[str, np.ndarray], ground_truth: COCO, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluator = evaluated(ground_truth, batches_of(real_predictions(golden, dtype), 7))
    # The same code on the same boxes: only the order of float64 sums could differ.
    np.testing.assert_allclose(evaluator.coco_eval["bbox"].stats, golden["stats"], rtol=0, atol=1e-9)
    assert capsys.readouterr().out == ""


def test_per_class_results_are_the_known_ones(golden: dict[str, np.ndarray], ground_truth: COCO) -> None:
    evaluator = evaluated(ground_truth, [real_predictions(golden, torch.float32)])
    results = per_class_results(evaluator.coco_eval["bbox"])
    known = dict(zip(golden["ap_category"].tolist(), golden["ap"].tolist(), strict=True))
    found = {result.category_id: result.ap for result in results if not np.isnan(result.ap)}
    assert {i: ap for i, ap in known.items() if ap > -1}.keys() == found.keys()
    for category_id, ap in found.items():
        assert ap == pytest.approx(known[category_id], abs=1e-9)
    assert sum(result.num_objects for result in results) == 839 - 9
    assert np.nanmean([result.ap50 for result in results]) == pytest.approx(golden["stats"][1], abs=1e-9)
    assert np.nanmean([result.ap75 for result in results]) == pytest.approx(golden["stats"][2], abs=1e-9)
    assert np.nanmean([result.ar100 for result in results]) == pytest.approx(golden["stats"][8], abs=1e-9)
    table = format_per_class_table(results).splitlines()
    assert len(table) == 81
    assert table[0].split() == ["id", "class", "objects", "AP", "AP50", "AP75", "AR100"]
    assert len({len(line) for line in table}) == 1
    assert any(line.split()[-4:] == ["-"] * 4 for line in table)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_equal_one(
    golden: dict[str, np.ndarray], ground_truth: COCO, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = real_predictions(golden, torch.float32)
    ids = list(predictions)
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        """What the last rank receives: the values of the ranks before it, then its own."""
        sent.append(value)
        return list(sent)

    monkeypatch.setattr(coco_eval, "all_gather_object", gather)
    for rank in range(world_size):
        evaluator = CocoEvaluator(ground_truth, ("bbox",))
        # Every rank sees its own images and, as a padding sampler would cause, the first one once more.
        evaluator.update({i: predictions[i] for i in [ids[0], *ids[rank::world_size]]})
        evaluator.synchronize_between_processes()
    assert len(sent) == world_size
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.img_ids == sorted(ids)
    np.testing.assert_allclose(evaluator.coco_eval["bbox"].stats, golden["stats"], rtol=0, atol=1e-9)


def test_gathered_detections_are_the_best_of_every_image_once(
    golden: dict[str, np.ndarray], ground_truth: COCO, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = real_predictions(golden, torch.float32)
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return list(sent)

    monkeypatch.setattr(coco_eval, "all_gather_object", gather)
    for images in (list(predictions)[:60], list(predictions)[50:]):
        evaluator = CocoEvaluator(ground_truth, ("bbox",))
        evaluator.update({image_id: predictions[image_id] for image_id in images})
        gathered = evaluator.gather_detections(most=3)
    assert [image_id for image_id, _ in gathered] == sorted(predictions)
    for image_id, rows in gathered:
        best = sorted(predictions[image_id]["scores"].tolist(), reverse=True)[:3]
        assert [row[4] for row in rows] == pytest.approx(best)


def _evaluate_on_rank(rank: int, rendezvous: str, ground_truth: COCO, predictions: Predictions, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    mine = list(EvalBatchSampler(len(predictions), batch_size=16, rank=rank, world_size=2))
    ids = sorted(predictions)
    evaluator = evaluated(ground_truth, [{ids[i]: predictions[ids[i]] for i in batch} for batch in mine])
    queue.put((len(evaluator.img_ids), evaluator.coco_eval["bbox"].stats.tolist()))
    dist.destroy_process_group()


def test_two_processes_both_get_the_figures_of_all_images(
    golden: dict[str, np.ndarray], ground_truth: COCO, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    predictions = real_predictions(golden, torch.float32)
    shared = (f"file://{tmp_path}/rendezvous", ground_truth, predictions, queue)
    processes = [context.Process(target=_evaluate_on_rank, args=(rank, *shared)) for rank in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    for count, stats in results:
        assert count == 100
        np.testing.assert_allclose(stats, golden["stats"], rtol=0, atol=1e-9)


def perfect(coco: COCO) -> Predictions:
    predictions = {}
    for image_id in coco.imgs:
        objects = coco.imgToAnns[image_id]
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64)
        predictions[image_id] = {"boxes": boxes, "scores": torch.full((len(objects),), 0.9), "labels": labels}
    return predictions


def test_perfect_detections_score_one_and_none_score_zero() -> None:
    coco = index_annotations(instances(4))
    perfect_stats = evaluated(coco, [perfect(coco)]).coco_eval["bbox"].stats
    assert perfect_stats[:3].tolist() == [1.0, 1.0, 1.0]
    nothing = {i: {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)} for i in coco.imgs}
    assert evaluated(coco, [nothing]).coco_eval["bbox"].stats[0] == 0.0


def test_only_images_given_are_evaluated() -> None:
    coco = index_annotations(instances(4))
    predictions = perfect(coco)
    evaluator = evaluated(coco, [{i: predictions[i] for i in (1, 3)}])
    assert evaluator.img_ids == [1, 3]
    assert evaluator.coco_eval["bbox"].stats[0] == 1.0
    assert sum(result.num_objects for result in per_class_results(evaluator.coco_eval["bbox"])) == 4


def test_crowd_regions_swallow_detections() -> None:
    content = instances(1)
    content["annotations"].append(annotation(9, 1, bbox=[20, 15, 20, 15], area=300.0, iscrowd=1))
    coco = index_annotations(content)
    predictions = perfect(coco)
    predictions[1]["scores"][2] = 0.99
    # Within the rounding of pycocotools' division by tp + fp + eps.
    assert evaluated(coco, [predictions]).coco_eval["bbox"].stats[0] == pytest.approx(1.0, abs=1e-12)
    content["annotations"].pop()
    without = index_annotations(content)
    # The same detection without the region is the best-scored false positive of its class.
    assert evaluated(without, [predictions]).coco_eval["bbox"].stats[0] < 0.99


def test_a_second_update_replaces_and_evaluates_anew() -> None:
    coco = index_annotations(instances(2))
    predictions = perfect(coco)
    evaluator = evaluated(coco, [predictions, {1: {name: value[:0] for name, value in predictions[1].items()}}])
    assert evaluator.coco_eval["bbox"].stats[0] < 0.99
    evaluator.update(predictions)
    evaluator.accumulate()
    assert "Average Precision" in evaluator.summarize()
    assert evaluator.coco_eval["bbox"].stats[0] == 1.0


def test_evaluator_without_any_image_gives_no_figures() -> None:
    assert evaluated(index_annotations(instances(2)), []).coco_eval["bbox"].stats.tolist() == [-1.0] * 12


def test_evaluator_refuses_what_it_cannot_do() -> None:
    coco = index_annotations(instances(2))
    with pytest.raises(DatasetError, match="boxes can be evaluated"):
        CocoEvaluator(coco, ("bbox", "segm"))
    with pytest.raises(DatasetError, match="image id 77"):
        CocoEvaluator(coco, ("bbox",)).update({77: perfect(coco)[1]})
