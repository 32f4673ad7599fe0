"""The numbers that pictures of a detector are drawn from: layers, attention, the denoising part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import main as program
from models import build_model, dn_components
from models.ops import reference
from models.transformers.dab_decoder import refine_boxes
from tools.detector import Detector
from tools.visualization.capture import (
    DenseAttention,
    SampledAttention,
    recorded_calls,
    recorded_modules,
    trace_cross_attention,
    trace_denoising,
    trace_layers,
)
from util.box_ops import inverse_sigmoid

ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only"
DINO = "dn_dab_dino_deformable_detr"
DENSE = ("dab_detr", "dn_dab_detr --use_dn --num_patterns 2")
SAMPLED = (
    "dn_dab_deformable_detr --use_dn",
    f"{DINO} --use_dn --two_stage --contrastive",
    "deformable_detr",
    "deformable_detr --with_box_refine",
    "deformable_detr --with_box_refine --two_stage",
)
LEVELED = f"{ENCODER_ONLY} --use_dn"
DENOISING = ("dn_dab_detr --use_dn", LEVELED, SAMPLED[0], SAMPLED[1])
SIZES = (
    "--backbone resnet18 --backbone_weights none --backbone_stages 3 --hidden_dim 32 --nheads 4 --enc_layers 1 "
    "--dec_layers 3 --dim_feedforward 32 --num_queries 6 --num_classes 3 --eval_scale 48 --dropout 0.1"
)
TARGET = {"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.4], [0.6, 0.3, 0.2, 0.2]])}


def build(options: str) -> Detector:
    """Return a small detector whose weights are all random: nothing starts at zero."""
    levels = "" if options.split()[0] in ("dab_detr", "dn_dab_detr") else "--num_feature_levels 3"
    args = program.parse_args(["-m", *options.split(), *SIZES.split(), *levels.split()])
    torch.manual_seed(0)
    model, _, postprocessors = build_model(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Detector(
        model.eval().requires_grad_(False), postprocessors["bbox"], args, ["N/A", "cat", "dog"], None, False
    )


@pytest.fixture
def image() -> Tensor:
    """Return a normalised picture of 64 x 48 pixels."""
    torch.manual_seed(2)
    return torch.randn(3, 48, 64)


@pytest.mark.parametrize("options", [*DENSE, LEVELED, *SAMPLED])
def test_layers_are_those_of_the_model(options: str, image: Tensor) -> None:
    detector = build(options)
    model: Any = detector.model
    with recorded_modules(model.transformer.decoder) as decoded:
        trace = trace_layers(model, image)
    outputs = model([image])
    layers = [*outputs["aux_outputs"], outputs]
    assert torch.equal(trace.boxes, torch.stack([layer["pred_boxes"][0] for layer in layers]))
    # Vectorised and single elements of a sigmoid differ in the last bit.
    assert torch.allclose(trace.probabilities[-1], outputs["pred_logits"][0].sigmoid(), atol=1e-7)
    assert len(trace.references) == len(trace.boxes) == 3
    if hasattr(model, "refpoint_embed"):
        anchors = model.refpoint_embed.weight.sigmoid()
        assert torch.allclose(trace.references[0][: len(anchors)], anchors, atol=1e-7)
    if options == "deformable_detr":
        assert all(torch.equal(points, trace.references[0]) for points in trace.references)
        assert trace.references[0].shape == (6, 2)
    elif options in SAMPLED:
        # Every later layer starts from the boxes predicted before it; heads on one row at a time round differently.
        for start, before in zip(trace.references[1:], trace.boxes, strict=False):
            assert torch.allclose(start, before, atol=1e-6)
    else:
        # These refine with the normed state what the next layer refines with the bare one.
        hidden = decoded[0][-1][0]
        predicted = refine_boxes(model.bbox_embed(hidden), torch.stack(trace.references)[:, None])
        assert torch.allclose(predicted[:, 0], trace.boxes, atol=1e-6)
    model.aux_loss = False
    assert torch.equal(trace_layers(model, image).boxes, trace.boxes)
    assert model.aux_loss is False


@pytest.mark.parametrize("options", DENSE)
def test_dense_weights_give_the_output_of_the_attention(options: str, image: Tensor) -> None:
    model: Any = build(options).model
    layers = model.transformer.decoder.layers
    with recorded_modules(*(layer.cross_attn for layer in layers)) as calls:
        traces = trace_cross_attention(model, image)
    assert len(traces) == len(layers)
    for layer, trace, (_, _, value, _, output) in zip(layers, traces, calls, strict=True):
        assert isinstance(trace, DenseAttention)
        weights = trace.maps[0].flatten(2)
        assert trace.maps[0].shape[-2:] == (3, 4)  # 48 x 64 pixels at stride 16
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        mixed = weights @ value[0].unflatten(-1, (4, -1)).transpose(0, 1)
        # float32 sums in another order.
        assert torch.allclose(layer.cross_attn.out_proj(mixed.transpose(0, 1).flatten(1)), output[0], atol=1e-5)


def test_weights_of_all_levels_give_the_mixture_of_levels(image: Tensor) -> None:
    model: Any = build(LEVELED).model
    layers = model.transformer.decoder.layers
    with (
        recorded_modules(*(layer.ca_v_proj for layer in layers)) as values,
        recorded_modules(*(layer.ca_out_v_proj for layer in layers)) as mixtures,
    ):
        traces = trace_cross_attention(model, image)
    for trace, (_, value), (mixture, _) in zip(traces, values, mixtures, strict=True):
        assert isinstance(trace, DenseAttention)
        assert [level.shape[-2:] for level in trace.maps] == [(6, 8), (3, 4), (2, 2)]
        weights = torch.cat([level.flatten(2) for level in trace.maps], dim=-1)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        mixed = weights @ value[0].unflatten(-1, (4, -1)).transpose(0, 1)
        assert torch.allclose(mixed.transpose(0, 1).flatten(1), mixture[0], atol=1e-5)  # float32, another order


@pytest.mark.parametrize("options", SAMPLED)
def test_sampling_points_give_the_output_of_the_operator(options: str, image: Tensor) -> None:
    model: Any = build(options).model
    attentions = [layer.cross_attn for layer in model.transformer.decoder.layers]
    with (
        recorded_modules(*attentions) as calls,
        recorded_modules(*(a.value_proj for a in attentions)) as values,
        recorded_modules(*(a.output_proj for a in attentions)) as sums,
        recorded_modules(*(a.sampling_offsets for a in attentions)) as offsets,
    ):
        traces = trace_cross_attention(model, image)
    for trace, call, value, total, offset in zip(traces, calls, values, sums, offsets, strict=True):
        assert isinstance(trace, SampledAttention)
        assert trace.locations.shape == (6, 4, 3, 4, 2)
        assert torch.allclose(trace.weights.sum((-1, -2)), torch.ones(()), atol=1e-5)
        _, references, _, shapes, *_ = call
        tokens = value[-1].view(1, -1, 4, value[-1].shape[-1] // 4)
        again = reference.forward(tokens, shapes, trace.locations[None], trace.weights[None])
        assert torch.allclose(again, total[0], atol=1e-5)  # another backend: float32 sums in another order
        moved = offset[-1].view(6, 4, 3, 4, 2)
        if references.shape[-1] == 4:
            reach = references[0, :, None, :, None, 2:] * 0.5 / 4
        else:
            reach = 1 / torch.tensor(shapes).flip(-1)[:, None]
        wanted = references[0, :, None, :, None, :2] + moved * reach
        assert torch.allclose(trace.locations, wanted, atol=1e-6)


@pytest.mark.parametrize("options", DENOISING)
def test_denoising_part_is_the_one_fed_in(options: str, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build(options).model
    with recorded_calls(dn_components, "add_noise") as drawn:
        first, again = (trace_denoising(model, image, TARGET, seed=3) for _ in range(2))
    assert not model.training
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))  # no dropout either
    noised_labels, noised_boxes = drawn[0][-1]
    assert torch.equal(first.noised_labels, noised_labels)
    # The models clamp to [0.001, 0.999] before the logit.
    assert torch.allclose(first.noised_boxes, inverse_sigmoid(noised_boxes).sigmoid(), atol=1e-6)
    contrastive = "--contrastive" in options
    copies = 4 if contrastive else 2
    assert first.group.tolist() == [group for group in range(5) for _ in range(copies)]
    assert first.known.tolist() == [0, 1] * (5 * copies // 2)
    assert first.negative.tolist() == [False, False, True, True][:copies] * 5
    assert (first.noised_labels[first.negative] == 3).all()
    other = trace_denoising(model, image, TARGET, seed=4)
    assert not torch.equal(first.noised_boxes, other.noised_boxes)
    # Without noise the answer of the model in training, dropout switched off, is the one shown.
    monkeypatch.setattr(dn_components, "add_noise", lambda labels, boxes, *_, **__: (labels, boxes))
    clean = trace_denoising(model, image, TARGET, seed=0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm):
            module.eval()
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    denoised = model([image], [TARGET])["dn_meta"]
    assert torch.allclose(clean.boxes, denoised.boxes_cxcywh[-1, 0][denoised.meta.slot_index], atol=1e-5)
    known = TARGET["boxes"][clean.known]
    assert torch.allclose(clean.noised_boxes, known, atol=1e-6)
