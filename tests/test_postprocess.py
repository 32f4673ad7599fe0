"""Top-k selection against recorded official results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.postprocess import PostProcess
from tests.golden_recipe import load_meta, load_npz, rs_for


@pytest.fixture(scope="module")
def golden():
    arrays = load_npz("postprocess.npz")
    return arrays, load_meta(arrays)


def _inputs(case):
    rs = rs_for(case["input_name"])
    shape = (case["batch"], case["queries"])
    logits = (rs.standard_normal((*shape, case["classes"])) * 2 - 3).astype(np.float32)
    u = rs.uniform(size=(*shape, 4))
    boxes = np.concatenate([u[..., :2], 0.05 + 0.5 * u[..., 2:]], -1).astype(np.float32)
    sizes = rs.randint(200, 900, size=(case["batch"], 2))
    return {"pred_logits": torch.from_numpy(logits), "pred_boxes": torch.from_numpy(boxes)}, torch.from_numpy(sizes)


def test_results_equal_official_in_every_recorded_case(golden):
    arrays, meta = golden
    for key, case in meta["cases"].items():
        outputs, sizes = _inputs(case)
        results = PostProcess(case["num_returned"])(outputs, sizes)
        for index, result in enumerate(results):
            np.testing.assert_array_equal(result["labels"], arrays[f"{key}/{index}/labels"], err_msg=key)
            np.testing.assert_allclose(result["scores"], arrays[f"{key}/{index}/scores"], rtol=1e-6, err_msg=key)
            # Pixels up to 900 in float32: a hundredth of a thousandth of a pixel.
            boxes = arrays[f"{key}/{index}/boxes"]
            np.testing.assert_allclose(result["boxes"], boxes, rtol=1e-5, atol=1e-4, err_msg=key)


def test_fewer_pairs_than_asked_for_are_all_returned():
    outputs = {"pred_logits": torch.randn(1, 2, 3), "pred_boxes": torch.rand(1, 2, 4)}
    (result,) = PostProcess(100)(outputs, torch.tensor([[10, 20]]))
    assert len(result["scores"]) == 6 and (result["scores"].diff() <= 0).all()


def test_sizes_that_do_not_fit_the_batch_are_refused():
    outputs = {"pred_logits": torch.randn(2, 2, 3), "pred_boxes": torch.rand(2, 2, 4)}
    with pytest.raises(ValueError, match=r"expected target_sizes of shape \(2, 2\)"):
        PostProcess()(outputs, torch.tensor([[10, 20]]))
