"""Parameter groups, rates and the average of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import main
from models import build_model, list_models
from tests.stand_ins import TinyDetector
from util.ema import ModelEma
from util.errors import OptionError
from util.optim import build_optimizer, drop_learning_rates, parameter_groups, resync_learning_rates

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimizer_groups.json").read_text())
COUNTED = [
    ("DN-DETR", "dn_dab_detr_r50", ["-m", "dn_dab_detr", "--use_dn"]),
    (
        "DN-DETR",
        "dn_dab_deformable_detr_r50",
        ["-m", "dn_dab_deformable_detr", "--transformer_activation", "relu", "--use_dn"],
    ),
    ("DAB-DETR", "dab_detr_r50", ["-m", "dab_detr"]),
    ("Deformable-DETR", "deformable_detr_r50", ["-m", "deformable_detr"]),
    ("Deformable-DETR", "deformable_detr_r50_two_stage", ["-m", "deformable_detr", "--with_box_refine", "--two_stage"]),
]


@pytest.mark.parametrize(("repo", "name", "argv"), COUNTED)
def test_groups_of_full_models_are_official(repo: str, name: str, argv: list[str]) -> None:
    if argv[1] not in list_models():
        pytest.skip(f"{argv[1]} is not registered")
    args = main.parse_args([*argv, "--backbone_weights", "none"])
    # On the meta device: names and sizes without memory or initialisation.
    with torch.device("meta"):
        model, _, _ = build_model(args)
    groups = parameter_groups(
        model,
        lr=args.lr,
        lr_backbone=args.lr_backbone,
        backbone_names=args.lr_backbone_names,
        linear_proj_names=args.lr_linear_proj_names,
        linear_proj_mult=args.lr_linear_proj_mult,
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(groups) == len(GOLDEN["counts"][repo][name])
    for group, (tensors, elements, rate, first, last) in zip(groups, GOLDEN["counts"][repo][name], strict=True):
        assert len(group["params"]) == tensors
        assert sum(parameter.numel() for parameter in group["params"]) == elements
        assert group["lr"] == pytest.approx(rate)
        assert [names[id(parameter)] for parameter in group["params"][:3]] == first
        assert [names[id(parameter)] for parameter in group["params"][-2:]] == last


@pytest.mark.parametrize(("repo", "modelname"), [("DN-DETR", "dn_dab_detr"), ("DAB-DETR", "dab_detr")])
def test_rates_by_epoch_are_official(repo: str, modelname: str) -> None:
    args = main.parse_args(["-m", modelname])
    model = TinyDetector()
    groups = parameter_groups(model, lr=args.lr, lr_backbone=args.lr_backbone, backbone_names=args.lr_backbone_names)
    optimizer = build_optimizer(groups, lr=args.lr, weight_decay=args.weight_decay, sgd=False)
    scheduler = StepLR(optimizer, args.lr_drop)
    seen = {}
    for epoch in range(args.epochs):
        seen[str(epoch)] = [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
    for epoch, rates in GOLDEN["lr_by_epoch"][repo].items():
        assert seen[epoch] == rates
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_frozen_parameters_are_in_no_group() -> None:
    model = TinyDetector()
    model.backbone.requires_grad_(False)
    groups = parameter_groups(model, lr=1.0, lr_backbone=0.1, backbone_names=["backbone"], linear_proj_names=["bbox"])
    assert [len(group["params"]) for group in groups] == [2, 0, 2]
    assert groups[2]["lr"] == pytest.approx(0.1)


def test_names_that_fit_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="--lr_linear_proj_names nothing fits none of the model's 6 parameters"):
        parameter_groups(
            TinyDetector(), lr=1.0, lr_backbone=1.0, backbone_names=["backbone"], linear_proj_names=["nothing"]
        )


def test_sgd_has_momentum() -> None:
    optimizer = build_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], lr=1.0, weight_decay=0.5, sgd=True)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 0.5)


def test_resync_keeps_rates_that_are_right_to_the_last_bit() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=3e-4)
    scheduler = StepLR(optimizer, 1)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    rate = optimizer.param_groups[0]["lr"]
    resync_learning_rates(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == rate
    drop_learning_rates(optimizer)
    assert optimizer.param_groups[0]["lr"] == rate * 0.1
    resync_learning_rates(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)


def test_average_shares_nothing_with_the_model_and_copies_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = ModelEma(model, decay=0.5)
    model(torch.randn(4, 2))
    before = ema.module[0].weight.clone()
    ema.update(model)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert torch.allclose(ema.module[0].weight, before)  # equal weights average to themselves
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_average_approaches_its_final_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ModelEma(model, decay=0.5)
    nn.init.ones_(model.weight)
    expected = 0.0
    for update in range(1, 20):
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + 1 - decay
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_average_keeps_shared_parameters_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.other = self.one

    ema = ModelEma(model := Shared(), decay=0.5)
    ema.update(model)
    assert ema.module.one is ema.module.other
