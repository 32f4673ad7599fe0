"""Losses and the criterion: recorded official numbers, empty images, names and weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models.criterion import SetCriterion, cardinality_error
from models.losses import class_error, elementwise_box_losses, focal_loss_sums
from models.matcher import HungarianMatcher
from tests.golden_recipe import load_npz
from util.box_ops import box_cxcywh_to_xyxy, elementwise_generalized_box_iou, generalized_box_iou


def test_focal_loss_equals_official():
    golden = load_npz("functions.npz")
    logits = torch.from_numpy(golden["focal/logits"]).requires_grad_()
    one_hot = torch.from_numpy(golden["focal/onehot"])
    positives = one_hot.flatten().nonzero().T
    # The official function takes the mean over queries, sums over images and classes and divides by the boxes.
    loss = focal_loss_sums(logits[None], positives, alpha=0.25).sum() / one_hot.shape[1] / 3
    loss.backward()
    torch.testing.assert_close(loss.item(), golden["focal/loss_num_boxes3_alpha0.25_gamma2"].item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, torch.from_numpy(golden["focal/grad"]), rtol=1e-5, atol=1e-7)
    plain = focal_loss_sums(logits[None], positives, alpha=-1).sum() / one_hot.shape[1] / 3
    torch.testing.assert_close(plain.item(), golden["focal/loss_alpha_minus1"].item(), rtol=1e-6, atol=0)


def test_box_losses_are_the_diagonal_of_all_pairs():
    torch.manual_seed(0)
    a, b = torch.rand(6, 4), torch.rand(6, 4)
    l1, giou = elementwise_box_losses(a, b)
    torch.testing.assert_close(l1.sum(-1), torch.cdist(a, b, p=1).diagonal())
    torch.testing.assert_close(giou, 1 - generalized_box_iou(box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b)).diagonal())


def test_focal_gradient_equals_automatic_differentiation_and_leaves_out_what_does_not_count():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5) * 6
    positives, counted = torch.tensor([[0, 7, 13], [19, 2, 6]]), torch.tensor([True, False, True])
    own, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    target = torch.zeros(2, 20, dtype=torch.float64).scatter_(1, positives[:, counted], 1).view(2, 4, 5)
    entropy = F.binary_cross_entropy_with_logits(reference, target, reduction="none")
    right = (reference.sigmoid() - 1 + target).abs()
    wanted = ((0.75 - target / 2) * entropy * (1 - right) ** 2).sum((1, 2))
    got = focal_loss_sums(own, positives, counted=counted)
    torch.testing.assert_close(got, wanted.float())
    scale = torch.tensor([1.0, -3.0])
    (got * scale).sum().backward()
    (wanted * scale).sum().backward()
    torch.testing.assert_close(own.grad, reference.grad.float(), rtol=1e-5, atol=1e-6)  # float32 against float64


def test_box_gradient_equals_automatic_differentiation():
    torch.manual_seed(0)
    boxes, target = (torch.cat((torch.rand(3, 40, 2), torch.rand(3, 40, 2) / 2), -1) for _ in "ab")
    boxes[:, :4] = target[:, :4]  # found exactly
    boxes[:, 4:8, 0] = target[:, 4:8, 0]
    boxes[:, 8:10, 2:] = 0  # without area
    own, reference = boxes.clone().requires_grad_(), boxes.clone().requires_grad_()
    l1, giou = elementwise_box_losses(own, target)
    overlap = elementwise_generalized_box_iou(box_cxcywh_to_xyxy(reference), box_cxcywh_to_xyxy(target))
    weight = torch.linspace(0, 1, 40)
    torch.testing.assert_close(giou, 1 - overlap)
    (5 * l1.sum(-1) + weight * giou).sum().backward()
    (5 * (reference - target).abs().sum(-1) - weight * overlap).sum().backward()
    torch.testing.assert_close(own.grad, reference.grad, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_class_error_counts_misses():
    logits = torch.eye(4)[None].expand(2, -1, -1)
    assert class_error(logits, torch.tensor([0, 1, 2, 0])).tolist() == [25.0, 25.0]
    assert class_error(torch.zeros(2, 0, 4), torch.zeros(0, dtype=torch.long)).tolist() == [100.0, 100.0]


def test_cardinality_error_is_the_mean_distance_of_counts():
    logits = torch.zeros(1, 2, 3, 4)
    logits[..., -1] = 1
    logits[0, 0, :2, 0] = 2  # two objects in image 0, none in image 1
    assert cardinality_error(logits, [3, 1]).tolist() == [1.0]


def _criterion(**options):
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    return SetCriterion(matcher=HungarianMatcher(), weight_dict=weights, **options)


def _outputs(layers=2, batch=2, queries=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    one = [
        {
            "pred_logits": torch.randn(batch, queries, classes, generator=generator, requires_grad=True),
            "pred_boxes": (torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.2).requires_grad_(),
        }
        for _ in range(layers)
    ]
    return {**one[-1], "aux_outputs": one[:-1]}


def _targets(*counts):
    generator = torch.Generator().manual_seed(1)
    return [
        {"labels": torch.randint(0, 4, (n,), generator=generator), "boxes": torch.rand(n, 4, generator=generator)}
        for n in counts
    ]


def test_losses_of_all_layers_equal_layer_by_layer():
    outputs, targets = _outputs(layers=3), _targets(2, 1)
    criterion = _criterion()
    together = criterion(outputs, targets)
    for index, layer in enumerate(outputs["aux_outputs"]):
        alone = criterion(layer, targets)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(together[f"{name}_{index}"], alone[name])


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_objects_give_finite_losses_and_gradients(counts):
    outputs = _outputs()
    losses = _criterion()(outputs, _targets(*counts))
    sum(losses.values()).backward()
    for layer in (outputs, *outputs["aux_outputs"]):
        assert torch.isfinite(layer["pred_logits"].grad).all()
        assert torch.isfinite(layer["pred_boxes"].grad).all()


def test_more_objects_than_queries_match_every_query_once():
    losses = _criterion()(_outputs(queries=2), _targets(5, 1))
    assert all(torch.isfinite(value) for value in losses.values())


def test_num_boxes_scales_the_matching_losses():
    outputs, targets = _outputs(), _targets(2, 1)
    plain, halved = _criterion()(outputs, targets), _criterion()(outputs, targets, num_boxes=torch.tensor(6.0))
    torch.testing.assert_close(plain["loss_giou_0"], halved["loss_giou_0"] * 2)


def test_losses_stay_float32_under_autocast():
    outputs = _outputs()
    half = {**outputs, "pred_logits": outputs["pred_logits"].bfloat16()}
    half["aux_outputs"] = [{k: v.bfloat16() for k, v in layer.items()} for layer in outputs["aux_outputs"]]
    half["pred_boxes"] = outputs["pred_boxes"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = _criterion()(half, _targets(2, 1))
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_denoising_losses_are_zero_without_a_denoising_part():
    losses = _criterion(denoising=True)(_outputs(), _targets(2, 1))
    assert {"tgt_loss_ce", "tgt_loss_ce_0", "tgt_class_error", "tgt_class_error_0"} <= set(losses)
    assert all(value.item() == 0 for name, value in losses.items() if name.startswith("tgt_"))
