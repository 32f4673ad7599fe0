"""Box arithmetic against recorded official numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden_recipe import load_npz
from util.box_ops import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    elementwise_generalized_box_iou,
    generalized_box_iou,
    inverse_sigmoid,
)

# Same float32 arithmetic in another order of sums: a few units in the last place.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(a) for name, a in load_npz("functions.npz").items() if a.dtype.kind in "fbi"}


def test_box_formats_equal_official(golden):
    corners = box_cxcywh_to_xyxy(golden["boxes/a_cxcywh"])
    torch.testing.assert_close(corners, golden["boxes/a_xyxy"], **CLOSE)
    torch.testing.assert_close(box_xyxy_to_cxcywh(corners), golden["boxes/a_back_to_cxcywh"], **CLOSE)


@pytest.mark.parametrize(("repository", "eps"), [("dn_detr", 1e-6), ("deformable_detr", 0.0)])
def test_overlaps_equal_official(golden, repository, eps):
    a, b = golden["boxes/a_xyxy"], golden["boxes/b_xyxy"]
    iou, union = box_iou(a, b, eps)
    torch.testing.assert_close(iou, golden[f"boxes/iou_{repository}"], equal_nan=True, **CLOSE)
    torch.testing.assert_close(union, golden[f"boxes/union_{repository}"], **CLOSE)
    giou = generalized_box_iou(a, b, eps)
    torch.testing.assert_close(giou, golden[f"boxes/giou_{repository}"], equal_nan=True, **CLOSE)


def test_elementwise_overlap_is_the_diagonal_of_all_pairs(golden):
    a, b = golden["boxes/a_xyxy"][:5], golden["boxes/b_xyxy"]
    torch.testing.assert_close(elementwise_generalized_box_iou(a, b), generalized_box_iou(a, b).diagonal())


def test_overlaps_are_float32_for_half_precision_boxes():
    boxes = torch.tensor([[0.1, 0.1, 0.2, 0.2]], dtype=torch.bfloat16)
    assert generalized_box_iou(boxes, boxes).dtype == torch.float32


@pytest.mark.parametrize(("repository", "eps"), [("dn_detr", 1e-3), ("deformable_detr", 1e-5)])
def test_inverse_sigmoid_equals_official(golden, repository, eps):
    actual = inverse_sigmoid(golden["inverse_sigmoid/in"], eps)
    np.testing.assert_allclose(actual, golden[f"inverse_sigmoid/{repository}"], rtol=1e-6, atol=1e-6)
