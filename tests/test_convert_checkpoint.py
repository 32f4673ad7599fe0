"""Checkpoints of other code bases: names, shapes, order, outputs, and what stands beside the weights."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import main
from models import build_model
from tests.golden_recipe import TESTS_DIR
from tools import convert_checkpoint
from tools.conversion import hugging_face
from util.checkpoint import load_checkpoint
from util.errors import CheckpointError
from util.nested_tensor import nested_tensor_from_tensor_list
from util.pretrain import load_pretrained_file

SMALL = [
    *("--backbone", "resnet18", "--hidden_dim", "64", "--enc_layers", "1", "--dec_layers", "2", "--num_queries", "5"),
    *("--dim_feedforward", "32", "--num_classes", "3", "--backbone_weights", "none"),
]
NAMES = json.loads((TESTS_DIR / "golden" / "transformers_names.json").read_text())


def small_model(*options: str) -> tuple[nn.Module, argparse.Namespace]:
    torch.manual_seed(0)
    args = main.parse_args([*options, *SMALL])
    model, _, _ = build_model(args)
    return randomize(model), args


def randomize(model: Any) -> Any:
    """Draw every parameter anew, so that no two tensors and no zero initialisation can be mistaken for each other."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 1.0 if parameter.dim() == 1 else 0.7 * parameter[0].numel() ** -0.5
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3 * scale)
    return model.eval()


def convert(source: Path, target: Path, *model: str) -> dict[str, Any]:
    """Run the tool and read what it wrote."""
    command = [str(source), str(target), *(["--", *model] if model else [])]
    assert convert_checkpoint.main(command) == 0
    return load_checkpoint(target)


def official_file(path: Path, model: nn.Module, args: argparse.Namespace) -> Path:
    """Write a checkpoint as the official training script does: options as a namespace, no class names."""
    official = argparse.Namespace(**{**vars(args), "use_mqs": False, "use_lft": False})
    del official.backbone_stages  # ours alone
    torch.save({"model": model.state_dict(), "epoch": 3, "args": official}, path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        "-m dn_dab_detr --use_dn --num_patterns 2",
        "-m dn_dab_dino_deformable_detr --use_dn --two_stage --contrastive",
        "-m deformable_detr --with_box_refine",
    ],
)
def test_official_and_ours_are_the_same_both_ways(options: str, tmp_path: Path) -> None:
    model, args = small_model(*options.split())
    expected = model.state_dict()
    official = official_file(tmp_path / "official.pth", model, args)
    ours = convert(official, tmp_path / "ours.pth")
    back = convert(tmp_path / "ours.pth", tmp_path / "back.pth")
    for content in (ours, back):
        assert list(content["model"]) == list(expected)
        assert all(torch.equal(content["model"][name], value) for name, value in expected.items())
    assert ours["options"] == back["options"]
    assert ours["options"]["modelname"] == args.modelname and ours["options"]["num_queries"] == 5
    # The official DINO-style model mixes queries although its file says it does not.
    assert ours["options"]["use_mqs"] == ("dino" in args.modelname)


def test_official_file_without_options_needs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = small_model("-m", "dab_detr")
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    assert convert_checkpoint.main([str(tmp_path / "bare.pth"), str(tmp_path / "out.pth")]) == 1
    assert "pass `-- -m MODEL`" in capsys.readouterr().err
    content = convert(tmp_path / "bare.pth", tmp_path / "out.pth", "-m", "dab_detr", *SMALL[:-4])
    assert content["options"]["num_classes"] == 3  # from the weights


def test_safetensors_hold_class_names_and_options(tmp_path: Path) -> None:
    model, args = small_model("-m", "deformable_detr")
    ours = {"model": model.state_dict(), "options": vars(args), "class_names": ["a", "b", "c"]}
    torch.save(ours, tmp_path / "checkpoint.pth")
    convert(tmp_path / "checkpoint.pth", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        beside = file.metadata()
    assert json.loads(beside["class_names"]) == ["a", "b", "c"]
    assert json.loads(beside["options"])["modelname"] == "deformable_detr" and beside["format"] == "pt"
    content = convert(tmp_path / "model.safetensors", tmp_path / "again.pth")
    assert list(content["model"]) == list(ours["model"]) and content["class_names"] == ["a", "b", "c"]
    assert all(torch.equal(content["model"][name], value) for name, value in ours["model"].items())


def test_coco_names_are_added_to_files_of_91_classes(tmp_path: Path) -> None:
    args = main.parse_args(["-m", "dab_detr", *SMALL, "--num_classes", "91"])
    torch.manual_seed(0)
    content = convert(official_file(tmp_path / "coco.pth", build_model(args)[0], args), tmp_path / "out.pth")
    assert content["class_names"][17] == "cat" and content["class_names"][12] == "N/A"


def test_averaged_weights_can_be_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, args = small_model("-m", "dab_detr")
    average = {name: value + 1 for name, value in model.state_dict().items()}
    content = {"model": model.state_dict(), "options": vars(args), "ema": {"model": average, "num_updates": 1}}
    torch.save(content, tmp_path / "checkpoint.pth")
    source, target = str(tmp_path / "checkpoint.pth"), str(tmp_path / "average.pth")
    assert convert_checkpoint.main([source, target, "--ema"]) == 0
    assert torch.equal(load_checkpoint(target)["model"]["class_embed.bias"], average["class_embed.bias"])
    assert convert_checkpoint.main([target, str(tmp_path / "x.pth"), "--ema"]) == 1
    assert "leave out --ema" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda weights: weights | {"transformer.surplus": torch.zeros(1)},
            "unknown to it, such as transformer.surplus",
        ),
        (
            lambda weights: {k: v for k, v in weights.items() if k != "input_proj.bias"},
            "missing, such as input_proj.bias",
        ),
        (lambda weights: weights | {"input_proj.bias": torch.zeros(1)}, "of another shape, such as input_proj.bias"),
        (lambda weights: dict(reversed(weights.items())), "in another order"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, args = small_model("-m", "dab_detr")
    torch.save({"model": change(dict(model.state_dict())), "options": vars(args)}, tmp_path / "bad.pth")
    assert convert_checkpoint.main([str(tmp_path / "bad.pth"), str(tmp_path / "out.pth")]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("model_type", "theirs", "ours"),
    [
        ("dab-detr", "model.query_refpoint_embeddings.weight", "refpoint_embed.weight"),
        ("dab-detr", "model.backbone.conv_encoder.model._backbone.layer1.0.bn1.bias",
         "backbone.0.body.layer1.0.bn1.bias"),
        ("dab-detr", "model.backbone.conv_encoder.model.encoder.stages.1.layers.0.shortcut.convolution.weight",
         "backbone.0.body.layer2.0.downsample.0.weight"),
        ("dab-detr", "model.backbone.conv_encoder.model.encoder.stages.3.layers.1.layer.2.normalization.bias",
         "backbone.0.body.layer4.1.bn3.bias"),
        ("dab-detr", "model.decoder.layers.1.cross_attn.cross_attn_query_pos_sine_proj.bias",
         "transformer.decoder.layers.1.ca_qpos_sine_proj.bias"),
        ("dab-detr", "model.decoder.layers.0.mlp.final_layer_norm.weight", "transformer.decoder.layers.0.norm3.weight"),
        ("dab-detr", "model.encoder.layers.0.activation_fn.weight", "transformer.encoder.layers.0.activation.weight"),
        ("deformable_detr", "model.decoder.layers.0.encoder_attn_layer_norm.bias",
         "transformer.decoder.layers.0.norm1.bias"),
        ("deformable_detr", "model.decoder.layers.0.self_attn_layer_norm.bias",
         "transformer.decoder.layers.0.norm2.bias"),
        ("deformable_detr", "model.encoder.layers.0.self_attn_layer_norm.bias",
         "transformer.encoder.layers.0.norm1.bias"),
        ("deformable_detr", "model.encoder.layers.0.fc1.bias", "transformer.encoder.layers.0.linear1.bias"),
        ("deformable_detr", "model.encoder.layers.0.mlp.fc1.bias", "transformer.encoder.layers.0.linear1.bias"),
        ("deformable_detr", "model.backbone.model.conv1.weight", "backbone.0.body.conv1.weight"),
        ("deformable_detr", "model.position_embedding.row_embeddings.weight", "backbone.1.row_embed.weight"),
        ("conditional_detr", "model.decoder.layers.0.encoder_attn.q_pos_sine_proj.bias",
         "transformer.decoder.layers.0.ca_qpos_sine_proj.bias"),
        ("conditional_detr", "model.decoder.layers.0.ca_v_proj.bias", "transformer.decoder.layers.0.ca_v_proj.bias"),
        ("conditional_detr", "class_labels_classifier.bias", "class_embed.bias"),
    ],
)  # fmt: skip
def test_transformers_name_becomes_ours(model_type: str, theirs: str, ours: str) -> None:
    assert hugging_face.rename(theirs, model_type) == ours


def recorded_model(case: str, folder: Path) -> dict[str, Tensor]:
    """Write a transformers model with recorded names and random values; return its weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(shape, generator=generator) for k, shape in NAMES[case]["tensors"].items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(NAMES[case]["config"]))
    return weights


@pytest.mark.parametrize("case", ["dab_detr", "deformable_detr_two_stage"])
def test_every_tensor_of_a_transformers_file_finds_its_place(case: str, tmp_path: Path) -> None:
    theirs = recorded_model(case, tmp_path)
    content = convert(tmp_path, tmp_path / "ours.pth")
    args = main.parse_args(["-m", content["options"]["modelname"], "--backbone_weights", "none"])
    model, _, _ = build_model(argparse.Namespace(**{**vars(args), **content["options"]}))
    model.load_state_dict(content["model"], strict=True)
    # Every number arrives exactly once: heads that both sides hold twice are counted once.
    values = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}
    ours = torch.cat([tensor.flatten() for tensor in values.values()])
    expected = torch.cat([tensor.flatten() for tensor in theirs.values()])
    assert torch.equal(ours.sort().values, expected.sort().values)
    assert content["class_names"] == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_conditional_detr_starts_a_dab_detr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = recorded_model("conditional_detr", tmp_path)
    content = convert(tmp_path, tmp_path / "ours.pth")
    assert "not in it: transformer.encoder.query_scale" in capsys.readouterr().out
    args = main.parse_args(["-m", "dab_detr", "--backbone_weights", "none"])
    model, _, _ = build_model(argparse.Namespace(**{**vars(args), **content["options"]}))
    report = load_pretrained_file(model, str(tmp_path / "ours.pth"), coco_names={1: "person", 90: "toothbrush"})
    assert not report.unfit
    parts = {name.removeprefix("transformer.").split(".layers.")[0].split(".weight")[0] for name in report.untouched}
    # Left alone: the anchors, what turns them into queries, and the scale of the encoder's positions.
    assert parts == {"encoder.query_scale", "decoder.ref_point_head", "decoder.ref_anchor_head", "refpoint_embed"}
    name = "model.decoder.layers.0.ca_qpos_proj.weight"
    assert torch.equal(model.state_dict()["transformer.decoder.layers.0.ca_qpos_proj.weight"], theirs[name])


def test_differing_heads_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = recorded_model("dab_detr", tmp_path)
    weights["model.decoder.bbox_embed.layers.0.bias"] = weights["bbox_predictor.layers.0.bias"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    assert convert_checkpoint.main([str(tmp_path), str(tmp_path / "ours.pth")]) == 1
    assert "are one tensor in this model, but differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "yolos"}, "got model_type 'yolos'"),
        ({"decoder_ffn_dim": 7}, "encoder_ffn_dim 32 and decoder_ffn_dim 7 differ"),
        ({"keep_query_pos": True}, "keep_query_pos"),
        ({"backbone_config": {"backbone": "swin_tiny"}}, "got 'swin_tiny'"),
        ({"backbone_config": {"model_type": "resnet", "depths": [1, 1, 1, 1]}}, "expected a ResNet-18, 34, 50 or 101"),
    ],
)
def test_transformers_model_without_counterpart_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        hugging_face.options_of(NAMES["dab_detr"]["config"] | change)


def test_incomplete_configuration_is_named() -> None:
    config = {key: value for key, value in NAMES["dab_detr"]["config"].items() if key != "temperature_height"}
    with pytest.raises(CheckpointError, match="does not say temperature_height"):
        hugging_face.options_of(config)


def transformers_model(case: str) -> tuple[Any, Any]:
    """Build a small random model of transformers."""
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {
        "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 9,
        "num_labels": 4, "dropout": 0.0,
    }  # fmt: skip
    if case == "dab_detr":
        config = transformers.DabDetrConfig(**size, hidden_size=64, num_patterns=2, backbone="resnet18")
        return transformers.DabDetrForObjectDetection, config
    if case == "dab_detr_own_resnet":
        body = transformers.ResNetConfig(
            layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], out_features=["stage4"]
        )
        config = transformers.DabDetrConfig(**size, hidden_size=64, backbone_config=body, normalize_before=True)
        return transformers.DabDetrForObjectDetection, config
    kind: dict[str, Any] = {
        "deformable_detr": {},
        "deformable_detr_single_scale_dc5": {"num_feature_levels": 1, "dilation": True},
        "deformable_detr_refine": {"with_box_refine": True},
        "deformable_detr_two_stage": {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 11},
    }[case]
    backbone = "resnet50" if "dilation" in kind else "resnet18"
    config = transformers.DeformableDetrConfig(**size, **kind, d_model=64, backbone=backbone)
    return transformers.DeformableDetrForObjectDetection, config


@pytest.mark.parametrize(
    "case",
    [
        "dab_detr",
        "dab_detr_own_resnet",
        "deformable_detr",
        "deformable_detr_single_scale_dc5",
        "deformable_detr_refine",
        "deformable_detr_two_stage",
    ],
)
def test_outputs_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    cls, config = transformers_model(case)
    torch.manual_seed(0)
    theirs = randomize(cls(config))
    theirs.save_pretrained(tmp_path)
    content = convert(tmp_path, tmp_path / "ours.pth")
    args = main.parse_args(["-m", content["options"]["modelname"], "--backbone_weights", "none"])
    ours, _, _ = build_model(argparse.Namespace(**{**vars(args), **content["options"]}))
    ours.load_state_dict(content["model"], strict=True)
    images = nested_tensor_from_tensor_list([torch.randn(3, 96, 128), torch.randn(3, 80, 104)])
    with torch.no_grad():
        expected = theirs(pixel_values=images.tensors, pixel_mask=(~images.mask).long())
        actual = ours.eval()(images)
    # float32 through some twenty layers; the two orders of summation differ by a few units in the last place.
    torch.testing.assert_close(actual["pred_logits"], expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual["pred_boxes"], expected.pred_boxes, rtol=1e-4, atol=1e-5)
    assert actual["pred_logits"].std() > 0.1  # the comparison is not one of constants


@pytest.mark.parametrize("naming", ["torchvision", "timm"])
def test_resnet_weights_become_a_backbone(naming: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = randomize(timm.create_model("resnet18", num_classes=10))
    weights = network.state_dict()  # the two agree on the names of plain ResNets
    torch.save(
        weights if naming == "timm" else {k: v for k, v in weights.items() if "fc" not in k}, tmp_path / "body.pth"
    )
    content = convert(tmp_path / "body.pth", tmp_path / "ours.pth", "-m", "dab_detr", "--backbone", "resnet18")
    assert all(name.startswith("backbone.0.body.") for name in content["model"])
    model, _, _ = build_model(main.parse_args(["-m", "dab_detr", *SMALL]))
    report = load_pretrained_file(model, str(tmp_path / "ours.pth"), coco_names={90: "toothbrush"})
    assert not report.unfit and all(not name.startswith("backbone.0") for name in report.untouched)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_features(images)
        actual = model.eval().backbone[0].body(images)[-1]
    # Frozen batch norm multiplies before it adds, by a factor computed once: a few units in the last place per layer.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_timm_weights_become_a_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = randomize(timm.create_model("convnext_atto", num_classes=10))
    torch.save(network.state_dict(), tmp_path / "body.pth")
    options = ["-m", "dn_deformable_detr", "--backbone", "timm:convnext_atto"]
    content = convert(tmp_path / "body.pth", tmp_path / "ours.pth", *options)
    model, _, _ = build_model(main.parse_args([*options, "--backbone_weights", "none", "--num_classes", "3"]))
    load_pretrained_file(model, str(tmp_path / "ours.pth"), coco_names={90: "toothbrush"})
    assert content["options"]["backbone"] == "timm:convnext_atto"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stages = model.eval().backbone[0].body(images)
        expected = network.forward_intermediates(images, indices=[1, 2, 3], intermediates_only=True)
    for ours, theirs in zip(stages, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
