"""Matching against recorded official pairs and by its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from models.matcher import HungarianMatcher, Layers, overlap_of_planes
from tests.golden_recipe import load_npz
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(a) for name, a in load_npz("functions.npz").items() if name.startswith("match/")}


def _case(golden, case):
    outputs = {name: golden[f"match/{case}/{name}"] for name in ("pred_logits", "pred_boxes")}
    targets = [
        {"labels": golden[f"match/{case}/labels{i}"], "boxes": golden[f"match/{case}/boxes{i}"]}
        for i in range(len(outputs["pred_logits"]))
    ]
    return outputs, targets


@pytest.mark.parametrize(("column", "alpha"), [("alpha0.25", 0.25), ("alpha0.6", 0.6), ("deformable", 0.25)])
@pytest.mark.parametrize("case", "abcd")
def test_matches_equal_official(golden, case, column, alpha):
    outputs, targets = _case(golden, case)
    pairs = HungarianMatcher(focal_alpha=alpha)(outputs, targets)
    rows = [[i, int(q), int(t)] for i, (qs, ts) in enumerate(pairs) for q, t in zip(qs, ts, strict=True)]
    assert rows == golden[f"match/{case}/{column}"].tolist()


def test_match_is_the_cheapest_assignment():
    torch.manual_seed(0)
    outputs = {"pred_logits": torch.randn(1, 5, 4), "pred_boxes": torch.rand(1, 5, 4) * 0.5 + 0.2}
    targets = [{"labels": torch.tensor([1, 3, 0]), "boxes": torch.rand(3, 4) * 0.5 + 0.2}]
    matcher = HungarianMatcher()
    cost = matcher.cost(Layers(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets))[0, 0].T
    ((query, target),) = matcher(outputs, targets)
    cheapest = min(sum(cost[q, t] for t, q in enumerate(qs)) for qs in itertools.permutations(range(5), 3))
    torch.testing.assert_close(cost[query, target].sum(), cheapest)


def test_costs_and_matches_are_those_of_the_full_matrix_of_all_queries_and_all_objects():
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 2, 30, 5) * 3, torch.rand(2, 2, 30, 4) * 0.5 + 0.2
    targets = [{"labels": torch.arange(count) % 5, "boxes": torch.rand(count, 4) * 0.5 + 0.2} for count in (12, 7)]
    matcher = HungarianMatcher(cost_class=2.5, cost_bbox=4.0, cost_giou=1.5, focal_alpha=0.3)
    layers = Layers(logits, boxes, targets)
    blocks, matches = matcher.cost(layers), matcher.match_layers(*layers)
    labels, wanted = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
    for layer in range(2):
        p = logits[layer].flatten(0, 1).sigmoid()[:, labels].double()
        given = boxes[layer].flatten(0, 1)
        entropy = 0.3 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.7 * p**2 * -(1 - p + 1e-8).log()
        overlap = generalized_box_iou(box_cxcywh_to_xyxy(given), box_cxcywh_to_xyxy(wanted))
        full = 2.5 * entropy + 4.0 * torch.cdist(given, wanted, p=1) - 1.5 * overlap
        parts = [full[:30, :12], full[30:, 12:]]
        pairs = []
        for image, part in enumerate(parts):
            # float32 against float64 of sums below 30
            torch.testing.assert_close(blocks[layer, image, : part.shape[1]].T.double(), part, rtol=1e-5, atol=1e-5)
            pairs += [
                (image, query, found + 12 * image) for query, found in zip(*linear_sum_assignment(part), strict=True)
            ]
        got = (matches.image, matches.query[layer], matches.target[layer])
        assert list(zip(*(each.tolist() for each in got), strict=True)) == pairs


def test_layers_are_matched_independently_in_one_call():
    torch.manual_seed(0)
    logits, boxes = torch.randn(3, 2, 6, 4), torch.rand(3, 2, 6, 4) * 0.5 + 0.2
    targets = [{"labels": torch.tensor(labels), "boxes": torch.rand(len(labels), 4)} for labels in ([1, 3], [0])]
    matcher = HungarianMatcher()
    together = matcher.match_layers(logits, boxes, targets)
    assert together.image.tolist() == [0, 0, 1] and together.counts == [2, 1]
    for layer in range(3):
        pairs = matcher({"pred_logits": logits[layer], "pred_boxes": boxes[layer]}, targets)
        assert together.query[layer].tolist() == torch.cat([q for q, _ in pairs]).tolist()
        assert together.target[layer].tolist() == [*pairs[0][1].tolist(), *(pairs[1][1] + 2).tolist()]


def test_layers_and_proposals_matched_together_equal_each_alone():
    torch.manual_seed(0)
    sets = []
    for depth, queries, labels in ((3, 6, ([1, 3], [0])), (1, 40, ([0, 0], [0]))):
        targets = [{"labels": torch.tensor(each), "boxes": torch.rand(len(each), 4)} for each in labels]
        boxes = torch.rand(depth, 2, queries, 4) * 0.5 + 0.2
        sets.append(Layers(torch.randn(depth, 2, queries, 4), boxes, targets))
    matcher = HungarianMatcher()
    for together, each in zip(matcher.match_all(sets), sets, strict=True):
        alone = matcher.match_layers(*each)
        assert all(torch.equal(one, other) for one, other in zip(together[:3], alone[:3], strict=True))
        assert together.counts == alone.counts


def test_overlap_of_planes_equals_the_overlap_of_all_pairs():
    torch.manual_seed(0)
    boxes, targets = torch.rand(3, 2, 7, 4), torch.rand(2, 5, 4)
    own, given = (box_cxcywh_to_xyxy(each).movedim(-1, 0) for each in (boxes, targets))
    got = overlap_of_planes(own[:, :, :, None], given[..., None], 1e-6)
    wanted = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets)[None])
    torch.testing.assert_close(got, wanted.transpose(2, 3))  # the same arithmetic in another layout


def test_a_prediction_that_is_not_a_number_is_matched_last():
    outputs = {"pred_logits": torch.zeros(1, 3, 2), "pred_boxes": torch.full((1, 3, 4), 0.5)}
    outputs["pred_boxes"][0, 0] = float("nan")
    ((query, _),) = HungarianMatcher()(outputs, [{"labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4)}])
    assert query.tolist() == [1, 2]


def test_all_costs_zero_is_refused():
    with pytest.raises(ValueError, match="nothing to match by"):
        HungarianMatcher(cost_class=0, cost_bbox=0, cost_giou=0)
