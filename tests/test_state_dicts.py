"""Full-size models: names, shapes, order, aliases and frozen parameters of the official checkpoints, initial values."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import main
from models import build_model
from models.backbones import resnet
from tests.golden_recipe import load_json

STATE_DICTS = (
    "dab_deformable_detr_r50",
    "dab_deformable_detr_r50_3pat",
    "dab_deformable_detr_r50_two_stage",
    "dab_detr_r101",
    "dab_detr_r50",
    "dab_detr_r50_3pat",
    "dab_detr_r50_dc5",
    "dab_detr_r50_dc5_3pat",
    "deformable_detr_r50",
    "deformable_detr_r50_iterative_bbox_refinement",
    "deformable_detr_r50_single_scale",
    "deformable_detr_r50_single_scale_dc5",
    "deformable_detr_r50_two_stage",
    "dn_dab_deformable_detr_deformable_encoder_only_r101",
    "dn_dab_deformable_detr_deformable_encoder_only_r50",
    "dn_dab_deformable_detr_r50",
    "dn_dab_detr_r101_dc5_3pat",
    "dn_dab_detr_r18",
    "dn_dab_detr_r50",
    "dn_dab_detr_r50_dc5",
    "dn_dab_detr_r50_dc5_3pat",
    "dn_dab_detr_r50_learned_pos",
    "dn_dab_detr_r50_prenorm",
    "dn_dab_dino_deformable_detr_r50",
    "dn_dab_dino_deformable_detr_r50_two_stage",
)
INITIAL_VALUES = (
    "dab_deformable_detr_r50",
    "dab_deformable_detr_r50_3pat",
    "dab_deformable_detr_r50_two_stage",
    "dab_detr_r50",
    "dab_detr_r50_3pat",
    "deformable_detr_r50",
    "deformable_detr_r50_iterative_bbox_refinement",
    "deformable_detr_r50_single_scale",
    "deformable_detr_r50_two_stage",
    "dn_dab_deformable_detr_deformable_encoder_only_r50",
    "dn_dab_deformable_detr_r50",
    "dn_dab_detr_r50",
    "dn_dab_detr_r50_learned_pos",
    "dn_dab_detr_r50_prenorm",
    "dn_dab_dino_deformable_detr_r50",
    "dn_dab_dino_deformable_detr_r50_two_stage",
)

ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only --use_dn --num_patterns 3 --transformer_activation relu"
# Trainable parameters with 91 classes, as published or counted in the official code.
TRAINABLE = {
    "dn_dab_deformable_detr --use_dn": 47_206_754,
    f"{ENCODER_ONLY} --backbone resnet50": 48_266_189,
    f"{ENCODER_ONLY} --backbone resnet101": 67_206_093,
    "dn_dab_dino_deformable_detr --use_dn --two_stage --use_mqs": 47_428_157,
    "dn_dab_dino_deformable_detr --use_dn --two_stage --use_mqs --num_queries 900": 47_581_757,
    "deformable_detr": 39_847_265,
    "deformable_detr --with_box_refine": 40_627_260,
    "deformable_detr --with_box_refine --two_stage": 40_959_129,
    "deformable_detr --num_feature_levels 1": 33_844_193,
    "dn_dab_detr --use_dn": 43_472_577,
    "dn_dab_detr --use_dn --backbone resnet101": 62_412_481,
}


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    # Frozen parameters are those of a model with ImageNet weights; the values of the weights do not matter here.
    monkeypatch.setattr(resnet, "imagenet_state_dict", lambda name: {})
    monkeypatch.setattr(resnet, "load_resnet_weights", lambda body, state_dict, source: None)


def _build(arguments, device="meta"):
    arguments = arguments if "-m" in arguments else ["-m", "deformable_detr", *arguments]
    with torch.device(device):
        return build_model(main.parse_args([*arguments, "--device", "cpu"]))


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_equals_official(name):
    golden = load_json(f"state_dict/{name}.json")
    model, criterion, _ = _build(golden["arguments"])
    entries = model.state_dict(keep_vars=True)
    ours = [[key, list(tensor.shape), str(tensor.dtype)] for key, tensor in entries.items()]
    assert ours == [[key, shape, f"torch.{dtype.removeprefix('torch.')}"] for key, shape, dtype in golden["state_dict"]]

    first, aliases = {}, {}
    for key, tensor in entries.items():
        if first.setdefault(id(tensor), key) != key:
            aliases[key] = first[id(tensor)]
    assert aliases == golden["aliases"]
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == golden["frozen_parameters"]
    assert sum(p.numel() for p in model.parameters()) == golden["num_params_total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == golden["num_params_trainable"]
    assert criterion.weight_dict == golden["weight_dict"]


@pytest.mark.parametrize(("options", "expected"), TRAINABLE.items(), ids=TRAINABLE)
def test_trainable_parameters_equal_the_published_count(options, expected):
    model, _, _ = _build(["-m", *options.split()])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def _is_exact(name):
    return bool(re.search(r"sampling_offsets\.bias$|bbox_embed\.\d+\.layers\.2\.bias$", name))


@pytest.mark.parametrize("name", INITIAL_VALUES)
def test_initial_values_follow_the_official_distributions(name):
    golden = load_json("init_stats.json")[name]
    torch.manual_seed(0)
    model, _, _ = _build(golden["arguments"], device="cpu")
    parameters = dict(model.named_parameters())
    assert [k for k in parameters if not k.startswith("backbone.")] == [row[0] for row in golden["rows"]]
    for key, shape, mean, std, low, high in golden["rows"]:
        values = parameters[key].detach().double().numpy()
        assert list(values.shape) == shape, key
        ours = (values.mean(), values.std(ddof=min(values.size - 1, 1)), values.min(), values.max())
        if std == 0 or _is_exact(key):  # printed with five digits
            np.testing.assert_allclose(ours, (mean, std, low, high), rtol=1e-4, atol=1e-6, err_msg=key)
            continue
        if values.size < 16:
            continue  # two to four numbers do not tell their distribution
        # Two samples of n values: five standard errors of their means and of their standard deviations.
        error = 5 * std * np.sqrt(2 / values.size)
        np.testing.assert_allclose(ours[0], mean, rtol=0, atol=error, err_msg=f"mean of {key}")
        np.testing.assert_allclose(ours[1], std, rtol=0, atol=error * np.sqrt(0.5), err_msg=f"std of {key}")
        if values.size > 1000 and high < 1.8 * std:  # uniform: a thousand values come within 2 % of the bound
            np.testing.assert_allclose(ours[3], high, rtol=0.02, err_msg=f"bound of {key}")
