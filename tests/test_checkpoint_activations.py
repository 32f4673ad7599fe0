"""Activation checkpointing changes memory and nothing else."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import main
from models import build_model
from tools.benchmarks.training_step import peak_bytes
from util.nested_tensor import nested_tensor_from_tensor_list
from util.step import backward

SMALL = (
    "--backbone resnet18 --backbone_weights none --hidden_dim 32 --nheads 4 --enc_layers 2 --dec_layers 2 "
    "--dim_feedforward 32 --num_queries 9 --num_classes 5 --dropout 0.2"
)
MODELS = (
    "dn_dab_detr --use_dn",
    "dn_dab_deformable_detr --use_dn",
    "dn_dab_deformable_detr_deformable_encoder_only --use_dn",
    "dn_dab_dino_deformable_detr --use_dn --two_stage",
    "deformable_detr",
)


def build(options: str) -> tuple[nn.Module, nn.Module]:
    """Build a small detector with dropout and its criterion, always the same."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model, criterion, _ = build_model(main.parse_args([*SMALL.split(), "-m", *options.split()]))
    logging.disable(logging.NOTSET)
    # With frozen statistics of one, untrained filters make numbers of a million out of noise.
    for name, parameter in model.named_parameters():
        if name.startswith("backbone") and parameter.ndim == 4:
            parameter.data.mul_(0.5)
    return model.train(), criterion


def step(model: nn.Module, criterion: nn.Module, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute losses and gradients of one batch, always the same."""
    torch.manual_seed(1)
    samples = nested_tensor_from_tensor_list([torch.randn(3, 64, 64), torch.randn(3, 48, 80)])
    targets = [{"labels": torch.tensor([1, 3]), "boxes": torch.rand(2, 4) * 0.4 + 0.3} for _ in range(2)]
    losses = backward(model, criterion, [(samples, targets)], **{"amp": False, **changes})
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", MODELS, ids=lambda options: options.split()[0])
def test_checkpoint_activations_gives_the_same_losses_and_gradients(options: str) -> None:
    losses, gradients = step(*build(options))
    model, criterion = build(f"{options} --checkpoint_activations")
    got_losses, got_gradients = step(model, criterion)
    # Dropout draws the same numbers again and every product is computed twice in the same way: equal to the bit.
    torch.testing.assert_close(got_losses, losses, rtol=0, atol=0)
    # Gradients that several paths add up to may be added in another order.
    torch.testing.assert_close(got_gradients, gradients, rtol=1e-5, atol=1e-6)
    assert len(gradients) > 50


def test_checkpoint_activations_works_in_mixed_precision() -> None:
    losses, gradients = step(*build(MODELS[1]), amp=True)
    got_losses, got_gradients = step(*build(f"{MODELS[1]} --checkpoint_activations"), amp=True)
    torch.testing.assert_close(got_losses, losses, rtol=0, atol=0)
    # Sums of bfloat16 gradients in another order.
    torch.testing.assert_close(got_gradients, gradients, rtol=0.05, atol=1e-2)


def test_checkpoint_activations_needs_less_memory() -> None:
    # Wide enough that the activations of the layers outweigh the gradients.
    options = f"{MODELS[1]} --enc_layers 4 --dim_feedforward 512 --backbone_stages 2"
    plain, checkpointed = build(options), build(f"{options} --checkpoint_activations")
    assert peak_bytes(lambda: step(*checkpointed)) < 0.7 * peak_bytes(lambda: step(*plain))


def test_checkpoint_activations_keeps_names_and_copies_stand_alone() -> None:
    plain, _ = build(MODELS[0])
    model, _ = build(f"{MODELS[0]} --checkpoint_activations")
    assert list(model.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    images = [torch.randn(3, 64, 64)]
    assert twin.eval()(images)["pred_boxes"].std() > 0
    torch.testing.assert_close(twin(images), plain.eval()(images), rtol=0, atol=0)


def test_checkpoint_activations_leaves_batch_norm_statistics_alone() -> None:
    trained = "--batch_norm_type BatchNorm2d"
    once, _ = build(f"{MODELS[0]} {trained}")
    twice, criterion = build(f"{MODELS[0]} {trained} --checkpoint_activations")
    step(once, criterion)
    step(twice, criterion)
    for (name, one), other in zip(once.named_buffers(), twice.buffers(), strict=True):
        assert torch.equal(one, other), name
