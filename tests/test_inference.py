"""Detectors made ready for inference compute what the detectors compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import main
from models import build_model
from models.backbones.fusion import fold_batch_norms
from models.backbones.resnet import ResNetBody
from models.inference import Float32, prepare_for_inference
from models.layers.feed_forward import CHUNK, build_activation, feed_forward
from tests.golden_models import SMALL_MODELS, load_reference
from tests.golden_recipe import images_of
from util.nested_tensor import nested_tensor_from_tensor_list


def randomize_norms(module: nn.Module) -> None:
    """Give batch norms statistics and affine parameters that are not the neutral ones."""
    for tensor in module.state_dict().values():
        if tensor.ndim == 1:  # the convolutions have no bias
            nn.init.uniform_(tensor, 0.5, 1.5)


def flat(outputs):
    """Return all prediction tensors of a detector's outputs by name."""
    found = {name: value for name, value in outputs.items() if name.startswith("pred_")}
    for index, layer in enumerate(outputs.get("aux_outputs", [])):
        found |= {f"{name}_{index}": value for name, value in layer.items()}
    return found


@pytest.mark.parametrize("norm", ["FrozenBatchNorm2d", "BatchNorm2d"])
@pytest.mark.parametrize(("name", "dilation"), [("resnet18", False), ("resnet50", True)])
def test_folded_backbone_equals_the_backbone(norm, name, dilation):
    torch.manual_seed(0)
    body = ResNetBody(name, norm=norm, dilation=dilation, return_levels=3).eval()
    randomize_norms(body)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = body(images)
        fold_batch_norms(body)
        actual = body(images)
    assert not [m for m in body.modules() if "BatchNorm" in type(m).__name__]
    for ours, theirs in zip(actual, expected, strict=True):
        # Rounding of up to 53 layers in float32, relative to the size of the map.
        torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=SMALL_MODELS)
def reference(request):
    return load_reference(request.param)


def test_prepared_detector_equals_the_detector(reference):
    arrays, meta, model, _, _ = reference
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    prepared = prepare_for_inference(model)
    with torch.no_grad():
        outputs = prepared(images_of(meta))
    # As between the detector and the official code: see test_golden_models.
    expected = torch.from_numpy(arrays["eval/pred_logits"])
    torch.testing.assert_close(outputs["pred_logits"][..., : expected.shape[-1]], expected, rtol=0, atol=1e-4)
    expected = torch.from_numpy(arrays["eval/pred_boxes"])
    torch.testing.assert_close(outputs["pred_boxes"], expected, rtol=0, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["dn_dab_detr", "deformable_detr", "dn_dab_dino_deformable_detr"])
def test_half_precision_detector_stays_near_the_detector(name):
    torch.manual_seed(0)
    sizes = ["--backbone", "resnet18", "--hidden_dim", "32", "--dim_feedforward", "48", "--nheads", "4"]
    sizes += ["--enc_layers", "2", "--dec_layers", "2", "--num_queries", "9", "--num_classes", "4"]
    refine = ["--with_box_refine"] if name == "deformable_detr" else []
    args = main.parse_args(["-m", name, *sizes, *refine, "--backbone_weights", "none"])
    model = build_model(args)[0].eval()
    images = [torch.randn(3, 64, 96)]
    half = prepare_for_inference(model, torch.bfloat16)
    with torch.no_grad():
        expected, actual = flat(model(images)), flat(half(images))
    assert set(actual) == set(expected)
    assert any(isinstance(module, Float32) for module in half.modules())
    assert {p.dtype for p in half.model.backbone.parameters()} == {torch.bfloat16}
    for key, value in actual.items():
        assert value.dtype == torch.float32
        # bfloat16 keeps 8 bits; a few roundings in a row leave a few percent.
        torch.testing.assert_close(value, expected[key], rtol=0.1, atol=0.1, msg=lambda text, key=key: f"{key}: {text}")


def test_shared_box_heads_stay_one_module_in_half_precision():
    args = main.parse_args(
        ["-m", "deformable_detr", "--backbone", "resnet18", "--backbone_weights", "none", "--num_classes", "4"]
    )
    half = prepare_for_inference(build_model(args)[0], torch.bfloat16)
    heads = list(half.model.bbox_embed)
    assert len({id(head) for head in heads}) == 1 and heads[0].module.layers[0].weight.dtype == torch.float32


def test_known_absence_of_padding_changes_nothing(reference):
    _, meta, model, _, _ = reference
    model.eval()
    image = images_of(meta)[0][:, :64, :96]
    batch = nested_tensor_from_tensor_list([image, image.flip(-1)])
    assert not batch.padded
    with torch.no_grad():
        known, unknown = flat(model(batch)), flat(model(batch._replace(padded=True)))
    for key, value in known.items():
        # Attention with a mask sums in another order than attention without.
        torch.testing.assert_close(value, unknown[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "prelu", "glu"])
def test_feed_forward_in_chunks_equals_the_whole(activation, monkeypatch):
    torch.manual_seed(0)
    linear1, dropout = nn.Linear(4, 6), nn.Dropout(0.5).eval()
    linear2, function = nn.Linear(3 if activation == "glu" else 6, 4), build_activation(activation)
    tokens = torch.randn(2, 2 * CHUNK + 3, 4, requires_grad=True)
    leaves = [tokens, *linear1.parameters(), *linear2.parameters()]

    def compute():
        result = feed_forward(tokens, linear1, function, linear2, dropout)
        return result, *torch.autograd.grad(result.square().mean(), leaves)

    parts = compute()
    monkeypatch.setattr("models.layers.feed_forward.CHUNK", 10**9)
    # The same sums in another order: those of weights over 4,000 tokens, chunk by chunk.
    torch.testing.assert_close(parts, compute(), rtol=1e-4, atol=1e-6)
