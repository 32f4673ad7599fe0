"""Which errors cost how much average precision, by the definitions of TIDE.

Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, sections
"Defining Error Types" and "Weighting the Errors". A detection is matched as in COCO at IoU 0.5. One that matches
nothing is, by the first rule that fits, an error of

localisation      IoU in [0.1, 0.5) with an object of its class
classification    IoU of at least 0.5 with an object of another class
duplicate         IoU of at least 0.5 with an object of its class that a better detection has
background        IoU below 0.1 with every object
both              what is left: IoU in [0.1, 0.5) with an object of another class

and an object is missed when no detection matches it and no error of localisation or classification lies on it. The
cost of a kind is the AP50 gained when an oracle mends this kind alone. It removes background, both and duplicate; it
does not ask for missed objects; of the errors of localisation and classification on an unmatched object it mends the
best one, if that is of this kind, and removes the others of this kind. So it is done in the authors' program, which
differs in one thing: a class without objects lowers its average precision, here it does not count, as in COCO.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
MENDABLE = ("classification", "localisation")
KINDS = (*MENDABLE, "both", "duplicate", "background", "missed")
_CORRECT, _NO_OBJECT = "correct", -1
_RECALLS = np.linspace(0, 1, 101)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Truth(NamedTuple):
    """Objects of one image: boxes (N, 4) left, top, width, height in pixels, category ids (N,), crowd flags (N,)."""

    boxes_xywh: Floats
    categories: Integers
    iscrowd: NDArray[np.bool_]


class Found(NamedTuple):
    """Detections of one image: boxes (n, 4) left, top, width, height in pixels, category ids (n,), scores (n,)."""

    boxes_xywh: Floats
    categories: Integers
    scores: Floats

    def rows(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Found:
        """Select detections by mask or positions."""
        return Found(self.boxes_xywh[index], self.categories[index], self.scores[index])


class Judged(NamedTuple):
    """One image's detections after matching, those on crowd regions left out.

    Attributes:
        found: the detections, best first.
        kinds: (n,) "correct" or the kind of error.
        objects: (n,) the object that is matched, or that a mended detection would match; -1 for none.
        is_matched, is_missed: (N,) about the objects; crowd regions are neither.
    """

    found: Found
    kinds: NDArray[np.str_]
    objects: Integers
    is_matched: NDArray[np.bool_]
    is_missed: NDArray[np.bool_]


@dataclass(frozen=True)
class ErrorCosts:
    """What the errors of a data set cost.

    Attributes:
        ap50: average precision at IoU 0.5 as it is, in [0, 1].
        gains: kind -> AP50 with this kind mended, minus `ap50`; also "false positives" (all of them removed) and
            "false negatives" (no object asked for that was not matched).
        counts: kind -> how many.
    """

    ap50: float
    gains: dict[str, float]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Ranking:
    """Detections of a data set, (n,) each, and how many objects every category has."""

    categories: Integers
    scores: Floats
    is_correct: NDArray[np.bool_]
    num_objects: Mapping[int, int]

    def average_precision(self) -> float:
        """Return COCO's AP at one IoU, the mean over the categories that have objects."""
        figures = [self._of_category(category) for category in self.num_objects]
        return float(np.mean(figures)) if figures else float("nan")

    def _of_category(self, category: int) -> float:
        chosen = self.categories == category
        if not chosen.any() or self.num_objects[category] <= 0:
            return 0.0
        correct = self.is_correct[chosen][np.argsort(-self.scores[chosen], kind="stable")]
        hits = np.cumsum(correct)
        precision = hits / np.arange(1, len(hits) + 1)
        highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(hits / self.num_objects[category], _RECALLS, side="left")
        return float(np.append(highest_from_here, 0.0)[places].mean())

    def keep(self, chosen: NDArray[np.bool_]) -> _Ranking:
        """Remove the other detections."""
        return replace(
            self,
            categories=self.categories[chosen],
            scores=self.scores[chosen],
            is_correct=self.is_correct[chosen],
        )

    def without_objects(self, fewer: Mapping[int, int]) -> _Ranking:
        """Ask for so many objects less of each category."""
        left = {category: number - fewer.get(category, 0) for category, number in self.num_objects.items()}
        return replace(self, num_objects=left)


def judge(truth: Truth, found: Found) -> Judged:
    """Match the detections of one image and name the errors."""
    found = found.rows(np.argsort(-found.scores, kind="stable"))
    iou = _overlaps(found.boxes_xywh, truth)
    same = found.categories[:, None] == truth.categories[None, :]
    objects = _match(iou, same, truth.iscrowd)
    on_crowd = (objects == _NO_OBJECT) & ((iou >= FOREGROUND_IOU) & same & truth.iscrowd[None, :]).any(axis=1)
    keep = ~on_crowd
    found, objects = found.rows(keep), objects[keep]
    is_matched = np.zeros(len(truth.categories), dtype=bool)
    is_matched[objects[objects != _NO_OBJECT]] = True
    # Crowd regions take part in nothing but the above.
    iou = np.where(truth.iscrowd[None, :], 0.0, iou[keep])
    kinds, objects = _name_errors(iou, same[keep], objects)
    covered = is_matched.copy()
    covered[objects[np.isin(kinds, MENDABLE)]] = True
    return Judged(found, kinds, objects, is_matched, ~covered & ~truth.iscrowd)


def weigh_errors(images: Iterable[tuple[Truth, Found]]) -> ErrorCosts:
    """Count the errors of a data set and compute what each kind costs."""
    pairs = [(truth, judge(truth, found)) for truth, found in images]
    kinds = _joined([judged.kinds for _, judged in pairs], "U16")
    missed = _count([truth.categories[judged.is_missed] for truth, judged in pairs])
    ranking = _Ranking(
        _joined([judged.found.categories for _, judged in pairs]),
        _joined([judged.found.scores for _, judged in pairs], np.float64),
        kinds == _CORRECT,
        _count([truth.categories[~truth.iscrowd] for truth, _ in pairs]),
    )
    unmatched = _count([truth.categories[~judged.is_matched & ~truth.iscrowd] for truth, judged in pairs])
    mended = {kind: ranking.keep(kinds != kind) for kind in ("both", "duplicate", "background")}
    mended |= _mend(ranking, kinds, pairs)
    mended["missed"] = ranking.without_objects(missed)
    mended["false positives"] = ranking.keep(ranking.is_correct)
    mended["false negatives"] = ranking.without_objects(unmatched)
    ap50 = ranking.average_precision()
    counts = {kind: int((kinds == kind).sum()) for kind in KINDS} | {"missed": sum(missed.values())}
    return ErrorCosts(ap50, {name: one.average_precision() - ap50 for name, one in mended.items()}, counts)


def _overlaps(boxes_xywh: Floats, truth: Truth) -> Floats:
    # For a crowd region pycocotools divides by the area of the detection alone.
    if not len(boxes_xywh) or not len(truth.boxes_xywh):
        return np.zeros((len(boxes_xywh), len(truth.boxes_xywh)))
    return np.asarray(mask.iou(boxes_xywh, truth.boxes_xywh, truth.iscrowd.astype(np.uint8)))


def _match(iou: Floats, same: NDArray[np.bool_], iscrowd: NDArray[np.bool_]) -> Integers:
    """Give every detection, best first, the free object of its class that it overlaps most, if by 0.5 or more."""
    objects = np.full(len(iou), _NO_OBJECT)
    possible = np.where(same & ~iscrowd[None, :] & (iou >= FOREGROUND_IOU), iou, 0.0)
    for number in np.flatnonzero(possible.any(axis=1)):
        best = int(possible[number].argmax())
        if possible[number, best] > 0:
            objects[number] = best
            possible[:, best] = 0.0
    return objects


def _name_errors(iou: Floats, same: NDArray[np.bool_], matched: Integers) -> tuple[NDArray[np.str_], Integers]:
    """Return kinds (n,) and objects (n,) as in `Judged`, from overlaps (n, N) and the matches (n,)."""
    kinds, objects = np.full(len(iou), _CORRECT, dtype="U16"), matched.copy()
    wrong = matched == _NO_OBJECT
    none = np.zeros((len(iou), 1))
    own = np.concatenate((np.where(same, iou, 0.0), none), axis=1)
    other = np.concatenate((np.where(same, 0.0, iou), none), axis=1)
    best_own, best_other = own.max(axis=1), other.max(axis=1)
    localisation = wrong & (best_own >= BACKGROUND_IOU) & (best_own < FOREGROUND_IOU)
    classification = wrong & ~localisation & (best_other >= FOREGROUND_IOU)
    duplicate = wrong & ~localisation & ~classification & (best_own >= FOREGROUND_IOU)
    background = wrong & (best_own < BACKGROUND_IOU) & (best_other < BACKGROUND_IOU)
    kinds[wrong] = "both"
    for kind, chosen in (
        ("localisation", localisation),
        ("classification", classification),
        ("duplicate", duplicate),
        ("background", background),
    ):
        kinds[chosen] = kind
    objects[localisation] = own.argmax(axis=1)[localisation]
    objects[classification] = other.argmax(axis=1)[classification]
    return kinds, objects


def _mend(ranking: _Ranking, kinds: NDArray[np.str_], pairs: Sequence[tuple[Truth, Judged]]) -> dict[str, _Ranking]:
    """For each mendable kind make its detections that are the best on their object correct, and remove its others."""
    # Objects are numbered through the whole data set.
    firsts = np.cumsum([0, *(len(truth.categories) for truth, _ in pairs)])
    objects = _joined([np.where(j.objects < 0, -1, j.objects + at) for (_, j), at in zip(pairs, firsts, strict=False)])
    object_categories = _joined([truth.categories for truth, _ in pairs])
    is_candidate = np.isin(kinds, MENDABLE) & ~np.isin(objects, objects[ranking.is_correct])
    candidates = np.flatnonzero(is_candidate)
    candidates = candidates[np.argsort(-ranking.scores[candidates], kind="stable")]
    best = candidates[np.unique(objects[candidates], return_index=True)[1]]
    mended = {}
    for kind in MENDABLE:
        chosen = kinds == kind
        fixed = best[chosen[best]]
        categories, is_correct, keep = ranking.categories.copy(), ranking.is_correct.copy(), ~chosen
        categories[fixed] = object_categories[objects[fixed]]
        is_correct[fixed] = True
        keep[fixed] = True
        mended[kind] = replace(ranking, categories=categories, is_correct=is_correct).keep(keep)
    return mended


def _count(categories_per_image: Sequence[Integers]) -> dict[int, int]:
    categories, numbers = np.unique(_joined(categories_per_image), return_counts=True)
    return dict(zip(categories.tolist(), numbers.tolist(), strict=True))


def _joined(parts: Sequence[NDArray[Any]], kind: Any = np.int64) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=kind), *parts])
