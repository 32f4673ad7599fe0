"""Kinds of errors and what they cost, on cases small enough to count by hand, and against COCO's average precision."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden_recipe import load_npz
from tools.reporting.errors import KINDS, Found, Truth, judge, weigh_errors

CAT, DOG = 1, 2
BOX = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 10.0, 10.0]
# Overlaps of 0.25 and 0.05 with BOX.
QUARTER, SLIVER = [0.0, 6.0, 10.0, 10.0], [0.0, 9.05, 10.0, 10.0]


def truth(*objects: tuple[list[float], int], crowd: tuple[bool, ...] | None = None) -> Truth:
    """Objects of an image from (box, category) pairs."""
    boxes = np.array([box for box, _ in objects], dtype=float).reshape(-1, 4)
    categories = np.array([category for _, category in objects], dtype=np.int64)
    return Truth(boxes, categories, np.array(crowd or [False] * len(objects), dtype=bool))


def found(*detections: tuple[list[float], int, float]) -> Found:
    """Detections of an image from (box, category, score) triples."""
    boxes = np.array([box for box, _, _ in detections], dtype=float).reshape(-1, 4)
    categories = np.array([category for _, category, _ in detections], dtype=np.int64)
    return Found(boxes, categories, np.array([score for _, _, score in detections], dtype=float))


@pytest.mark.parametrize(
    ("box", "category", "kind"),
    [
        (BOX, CAT, "correct"),
        (BOX, DOG, "classification"),
        (QUARTER, CAT, "localisation"),
        (QUARTER, DOG, "both"),
        (SLIVER, CAT, "background"),
        (FAR, DOG, "background"),
    ],
)
def test_one_detection_is_of_its_kind(box: list[float], category: int, kind: str) -> None:
    judged = judge(truth((BOX, CAT)), found((box, category, 0.5)))
    assert judged.kinds.tolist() == [kind]
    # Both and background leave the object missed, localisation and classification could be mended.
    assert judged.is_missed.tolist() == [kind in ("both", "background")]


def test_worse_detection_of_a_found_object_is_a_duplicate() -> None:
    judged = judge(truth((BOX, CAT)), found((BOX, CAT, 0.5), ([0.0, 1.0, 10.0, 10.0], CAT, 0.9)))
    # Best first: the one with the higher score takes the object.
    assert judged.kinds.tolist() == ["correct", "duplicate"] and judged.found.scores.tolist() == [0.9, 0.5]
    assert not judged.is_missed.any()


def test_detection_on_a_crowd_region_is_left_out() -> None:
    crowd = truth(([0.0, 0.0, 100.0, 100.0], CAT), crowd=(True,))
    judged = judge(crowd, found((FAR, CAT, 0.5), (FAR, DOG, 0.4)))
    assert judged.kinds.tolist() == ["background"] and judged.found.categories.tolist() == [DOG]
    assert not judged.is_missed.any() and not judged.is_matched.any()


def test_images_without_objects_or_detections_are_judged() -> None:
    assert judge(truth(), found((BOX, CAT, 0.5))).kinds.tolist() == ["background"]
    assert judge(truth((BOX, CAT)), found()).is_missed.tolist() == [True]
    costs = weigh_errors([(truth(), found((BOX, CAT, 0.5)))])
    assert np.isnan(costs.ap50) and costs.counts["background"] == 1


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ((FAR, DOG, 0.9), "classification"),
        (([50.0, 56.0, 10.0, 10.0], CAT, 0.9), "localisation"),
    ],
)
def test_a_mended_detection_finds_its_object(wrong: tuple[list[float], int, float], kind: str) -> None:
    image = truth((BOX, CAT), (FAR, CAT), ([80.0, 0.0, 9.0, 9.0], DOG))
    costs = weigh_errors([(image, found((BOX, CAT, 0.5), wrong, ([80.0, 0.0, 9.0, 9.0], DOG, 0.95)))])
    # The cats' precision at recall 0.5 is 1 (classification) or 1/2 behind the wrong box, over 51 of 101 recalls.
    before = 51 / 101 * (1.0 if kind == "classification" else 0.5)
    assert costs.ap50 == pytest.approx((before + 1.0) / 2)
    assert costs.gains[kind] == pytest.approx((1.0 - before) / 2)
    assert costs.counts == {name: int(name == kind) for name in KINDS}


@pytest.mark.parametrize(
    ("box", "category", "kind"),
    [(BOX, CAT, "duplicate"), ([200.0, 0.0, 5.0, 5.0], CAT, "background"), ([50.0, 56.0, 10.0, 10.0], CAT, "both")],
)
def test_a_removed_error_no_longer_stands_before_a_correct_one(box: list[float], category: int, kind: str) -> None:
    images = [
        (truth((BOX, CAT), (FAR, DOG)), found((BOX, CAT, 0.9), (box, category, 0.8), (FAR, DOG, 0.9))),
        (truth((BOX, CAT)), found((BOX, CAT, 0.7))),
    ]
    costs = weigh_errors(images)
    # Cats: correct, wrong, correct: precision 1 up to recall 0.5, then 2/3.
    assert costs.ap50 == pytest.approx(((51 + 50 * 2 / 3) / 101 + 1.0) / 2)
    assert costs.gains[kind] == pytest.approx(50 / 3 / 101 / 2)
    assert costs.gains["false positives"] == pytest.approx(costs.gains[kind])
    assert costs.counts[kind] == 1


def test_missed_objects_are_not_asked_for() -> None:
    costs = weigh_errors([(truth((BOX, CAT), (FAR, CAT)), found((BOX, CAT, 0.9)))])
    assert costs.ap50 == pytest.approx(51 / 101)
    assert costs.gains["missed"] == costs.gains["false negatives"] == pytest.approx(50 / 101)
    assert costs.counts["missed"] == 1


def test_only_the_best_detection_of_an_object_is_mended() -> None:
    # The class error is the better one: mending boxes removes the other and finds nothing.
    image = truth((BOX, CAT))
    costs = weigh_errors([(image, found((BOX, DOG, 0.9), (QUARTER, CAT, 0.8)))])
    assert costs.gains["classification"] > 0 and costs.gains["localisation"] == 0


def test_average_precision_is_that_of_coco() -> None:
    golden = load_npz("coco_eval.npz")
    images = []
    for image_id in golden["image_ids"].tolist():
        own, mine = golden["gt_image"] == image_id, golden["dt_image"] == image_id
        objects = Truth(golden["gt_bbox"][own], golden["gt_category"][own], golden["gt_iscrowd"][own].astype(bool))
        detections = Found(golden["dt_bbox"][mine], golden["dt_category"][mine], golden["dt_score"][mine])
        images.append((objects, detections))
    costs = weigh_errors(images)
    # pycocotools divides by a precision with 2e-16 added.
    assert costs.ap50 == pytest.approx(golden["stats"][1], abs=1e-9)
    # Counted by the program of TIDE's authors (tidecv 1.0.1) on the same files.
    assert costs.counts == {
        "classification": 83, "localisation": 1, "both": 0, "duplicate": 1, "background": 0, "missed": 97
    }  # fmt: skip
