"""The host waits for the device twice per training step: to match, and to see that all is finite and to log it."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import main
from engine import train_one_epoch
from models import build_model
from tests.stand_ins import engine_args
from tools.benchmarks.synchronisations import counted
from util.ema import ModelEma
from util.nested_tensor import nested_tensor_from_tensor_list
from util.optim import build_optimizer
from util.step import weighted_sum

SMALL = (
    "--backbone resnet18 --backbone_weights none --batch_norm_type BatchNorm2d --hidden_dim 32 --nheads 4 "
    "--enc_layers 1 --dec_layers 3 --dim_feedforward 32 --num_queries 9 --num_classes 5"
)
DINO = "dn_dab_dino_deformable_detr --use_dn --two_stage --contrastive --scalar 2"
MODELS = (
    "dn_dab_detr --use_dn --num_patterns 2",
    "dn_dab_deformable_detr --use_dn",
    "dn_dab_deformable_detr_deformable_encoder_only --use_dn",
    "deformable_detr --with_box_refine --two_stage --checkpoint_activations",
    DINO,
)
CPU = torch.device("cpu")


class Batches:
    """Pairs of pictures of unequal sizes with objects, with a single one, and without any."""

    def __init__(self, counts: list[tuple[int, int]]) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[Any]:
        for number, counts in enumerate(self.counts):
            targets = [
                {
                    "labels": torch.arange(count) % 5,
                    "boxes": torch.rand(count, 4) * 0.4 + 0.3,
                    "image_id": torch.tensor([number]),
                }
                for count in counts
            ]
            yield nested_tensor_from_tensor_list([torch.randn(3, 64, 64), torch.randn(3, 48, 80)]), targets


def prepare(options: str, *, sgd: bool = False) -> tuple[torch.nn.Module, torch.nn.Module, torch.optim.Optimizer]:
    """Build a small detector, its criterion and the optimizer of the program."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    args = main.parse_args(["-m", *options.split(), *SMALL.split()])
    model, criterion, _ = build_model(args)
    logging.disable(logging.NOTSET)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    return model, criterion, build_optimizer(groups, lr=1e-4, weight_decay=1e-4, sgd=sgd)


def waits_per_step(options: str, counts: list[tuple[int, int]], **changes: Any) -> tuple[list[list[str]], list[str]]:
    """Train one epoch with a log line per step; return what made the host wait until each step's end, and after all."""
    model, criterion, optimizer = prepare(options, sgd=changes.pop("sgd", False))
    scaler = changes.pop("scaler", None)
    args: argparse.Namespace = engine_args(**{"print_freq": 1, **changes})
    steps: list[list[str]] = []
    with counted() as waits:
        waits.mark([*model.parameters(), *model.buffers()])

        def after_step(batches_done: int) -> None:
            steps.append(waits.found.copy())
            waits.found.clear()

        ema = ModelEma(model, 0.9)
        loader = Batches(counts)
        extra = {"scaler": scaler, "ema": ema, "after_step": after_step}
        train_one_epoch(model, criterion, loader, optimizer, CPU, 0, args=args, **extra)
    return steps, waits.found


def assert_two(steps: list[list[str]], after: list[str]) -> None:
    """Check that the host waited in the matcher and for the numbers of the step, and for nothing else."""
    for found in steps:
        assert len(found) == 2, found
        assert "matcher.py" in found[0] and "metrics.py" in found[1]
    assert not after  # the means of the epoch were all on the host


@pytest.mark.parametrize("options", MODELS, ids=lambda options: options.split()[0])
def test_synchronisations_of_a_step_with_its_log_line_are_two(options: str) -> None:
    assert_two(*waits_per_step(options, [(3, 2), (1, 0), (0, 0)]))


def test_synchronisations_are_the_same_with_and_without_log_lines() -> None:
    assert_two(*waits_per_step("dn_dab_detr --use_dn", [(2, 1)] * 5, print_freq=2))


@pytest.mark.parametrize("sgd", [False, True])
def test_synchronisations_of_a_step_in_float16_are_two(sgd: bool) -> None:
    # The scale of the loss stays on the device, and the fused optimizer asks there whether to skip the step.
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    changes = {"scaler": scaler, "sgd": sgd, "amp": True, "amp_dtype": "float16"}
    assert_two(*waits_per_step("dn_dab_detr --use_dn", [(2, 1)] * 3, **changes))


def test_synchronisations_of_accumulated_batches_are_one_each_and_one_more() -> None:
    steps, _ = waits_per_step("dn_dab_detr --use_dn", [(2, 1)] * 3, accumulate_steps=3)
    assert [len(found) for found in steps] == [4]


def test_synchronisations_are_noticed_in_every_form() -> None:
    with counted() as waits:
        scores = torch.arange(4.0).to("cpu")
        readers = (
            lambda x: x.sum().item(), lambda x: float(x[0] * 2), lambda x: bool((x > 1).any()), lambda x: x.cpu(),
            lambda x: (x + 1).tolist(), lambda x: x.numpy(), lambda x: x[x > 1], lambda x: (x > 2).nonzero(),
            lambda x: x.masked_select(x > 0), lambda x: x.unique(), lambda x: torch.equal(x, x + 1),
            lambda x: torch.arange(4).repeat_interleave(x.long()),
        )  # fmt: skip
        for number, read in enumerate(readers, start=1):
            read(scores)
            assert len(waits.found) == number, number
        host = torch.arange(4.0)
        assert host.sum().item() == 6 and host.tolist() and len(waits.found) == len(readers)
        assert scores.cpu().sum().item() == 6  # what came to the host once is read for nothing
        assert len(waits.found) == len(readers) + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", MODELS, ids=lambda options: options.split()[0])
def test_synchronisations_of_a_step_on_a_gpu_are_two(options: str, recwarn: pytest.WarningsRecorder) -> None:
    model, criterion, optimizer = prepare(options)
    device = torch.device("cuda")
    model.to(device)
    steps: list[int] = []

    def after_step(batches_done: int) -> None:
        steps.append(len([w for w in recwarn.list if "synchroniz" in str(w.message)]))
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")  # from the second step on, when kernels are loaded and memory is there

    warnings.simplefilter("always")  # the same place warns in every step
    try:
        loader = Batches([(3, 2)] * 4)
        args = engine_args(print_freq=1)
        train_one_epoch(model, criterion.to(device), loader, optimizer, device, 0, args=args, after_step=after_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps[1:] == [2, 2, 2]


def test_weighted_sum_of_the_program_is_that_of_its_definition() -> None:
    losses: dict[str, Tensor] = {"a": torch.tensor(2.0), "logged": torch.tensor(9.0), "b": torch.tensor(0.5)}
    assert weighted_sum(losses, {"a": 3.0, "b": 4.0}).item() == 8.0
