"""Exported detectors: equal to PyTorch for other sizes than those traced, and usable without this code base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import main
from models import build_model, list_models
from models.layers.feature_projection import resize_mask
from models.layers.ms_deform_attn import MSDeformAttn
from models.postprocess import PostProcess
from tools import export
from tools.exporting import trace, verify
from tools.exporting.wrapper import ExportableDetector, PlainMSDeformAttn
from util.errors import ExportError

EXAMPLE = Path(__file__).resolve().parents[1] / "tools" / "examples" / "run_onnx.py"
ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only"
DINO = "dn_dab_dino_deformable_detr"
SMALL = (
    "--backbone resnet18 --backbone_weights none --backbone_stages 3 --hidden_dim 32 --nheads 4 --enc_layers 1 "
    "--dec_layers 2 --dim_feedforward 32 --num_queries 12 --num_classes 4 --device cpu --eval_scale 72 "
    "--data_aug_max_size 120"
)
# Options of main.py, then those of the export. Every model and kind of graph; the first are quick.
LEAST = "--num_feature_levels 1 --backbone_stages 2 --dec_layers 1"
QUICK = (("dab_detr", "--format torch_export --postprocess"), (f"deformable_detr {LEAST}", "--no_mask"))
THOROUGH = (
    ("dab_detr --num_patterns 2", ""),
    ("dn_dab_detr --use_dn", "--postprocess"),
    ("dn_dab_detr --position_embedding learned", ""),
    ("dab_deformable_detr", ""),
    ("dab_deformable_detr --two_stage", "--format torch_export"),
    ("dn_dab_deformable_detr --use_dn", "--no_mask --postprocess"),
    ("dn_deformable_detr --num_feature_levels 3", ""),
    (f"{ENCODER_ONLY} --num_patterns 2", ""),
    (DINO, ""),
    (f"{DINO} --two_stage --use_dn --contrastive", ""),
    ("deformable_detr", "--format torch_export"),
    ("deformable_detr --with_box_refine", ""),
    ("deformable_detr --with_box_refine --two_stage", "--postprocess"),
    ("deformable_detr --num_feature_levels 1 --dilation --backbone_stages 4", ""),
)


def make_checkpoint(options: str, path: Path) -> None:
    """Write a checkpoint with random weights, heads included."""
    # On the command line the last value wins.
    args = main.parse_args([*SMALL.split(), "-m", *options.split()])
    torch.manual_seed(0)
    model, _, _ = build_model(args)
    for name, parameter in model.named_parameters():
        # Heads start at zero and would hide what comes before them.
        if "bbox_embed" in name or "class_embed" in name:
            nn.init.normal_(parameter, std=0.3)
    names = ["N/A", "cell", "disc", "bar"]
    torch.save({"model": model.state_dict(), "options": vars(args), "class_names": names}, path)


def export_checkpoint(options: str, flags: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Export a random detector through the program; return the file and the figures."""
    make_checkpoint(options, folder / "checkpoint.pth")
    if "torch_export" not in flags:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    output = folder / ("model.pt2" if "torch_export" in flags else "model.onnx")
    argv = [str(folder / "checkpoint.pth"), "--output", str(output), "--rounds", "0", *flags.split()]
    assert export.main([*argv, "--json", str(folder / "figures.json")]) == 0
    return output, json.loads((folder / "figures.json").read_text())


def check_export(options: str, flags: str, folder: Path) -> None:
    """Export, which compares with PyTorch, and check that the comparison was one."""
    output, record = export_checkpoint(options, flags, folder)
    assert output.is_file() and [path.name for path in folder.glob(".unchecked*")] == []
    (first, second), smallest = record["batches"], record["sides"][0]
    assert first[0] == 1 and second[0] == 3 and first[2] != first[3]
    # Traced with batches of two and one size; both batches of the check are others.
    assert len({tuple(first[2:]), tuple(second[2:]), (smallest + 45, smallest + 82)}) == 3
    assert record["boxes"] <= verify.TOLERANCE and record["probabilities"] <= verify.TOLERANCE
    assert ("padding_mask" in record["inputs"]) == ("--no_mask" not in flags)
    assert ("sizes" in record["inputs"]) == ("scores" in record["outputs"]) == ("--postprocess" in flags)


@pytest.mark.parametrize(("options", "flags"), QUICK)
def test_export_equals_pytorch(options: str, flags: str, tmp_path: Path) -> None:
    check_export(options, flags, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "flags"), THOROUGH)
def test_export_of_every_model_equals_pytorch(options: str, flags: str, tmp_path: Path) -> None:
    check_export(options, flags, tmp_path)


def test_every_model_is_exported() -> None:
    names = {options.split()[0] for options, _ in (*QUICK, *THOROUGH)}
    assert names == set(list_models())


@pytest.mark.slow
def test_onnx_file_uses_the_standard_domain_and_describes_itself(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path, _ = export_checkpoint(f"deformable_detr {LEAST}", "", tmp_path)
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    shapes = {each.name: [d.dim_param for d in each.type.tensor_type.shape.dim] for each in model.graph.input}
    assert set(shapes) == {"images", "padding_mask"}
    assert [bool(name) for name in shapes["images"]] == [True, False, True, True]
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["class_names"] == ["N/A", "cell", "disc", "bar"] and about["category_ids"] == [0, 1, 2, 3]
    assert (about["short_side"], about["long_side"], about["num_results"]) == (72, 120, 100)
    assert about["options"]["hidden_dim"] == 32 and "batch_size" not in about["options"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--no_mask --postprocess"])
def test_example_runs_without_torch_and_without_this_code(flags: str, tmp_path: Path) -> None:
    export_checkpoint(f"deformable_detr {LEAST}", flags, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['run_onnx.py', 'model.onnx', 'picture.png', '--output', 'drawn.png', '--min_score', '0']\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
        "found = {'torch', 'models', 'datasets', 'tools', 'util', 'main'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # Twelve queries and four classes, fewer than the hundred results asked for.
    assert "48 objects" in lines[0] and len(lines) == 49 and "from (" in lines[1]
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (70, 50) and np.any(np.asarray(drawn) != pixels)


def test_plain_attention_equals_the_module() -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=2)
    nn.init.normal_(module.sampling_offsets.weight)
    nn.init.normal_(module.attention_weights.weight)
    plain, shapes = PlainMSDeformAttn(module), [(4, 5), (2, 3)]
    tokens, query = torch.randn(2, 26, 16), torch.randn(2, 7, 16)
    mask = torch.arange(26).expand(2, -1) % 5 == 0
    for coordinates in (2, 4):
        references = torch.rand(2, 7, 2, coordinates)
        arguments = (query, references, tokens, shapes, [0, 20], mask)
        # The compiled operator adds in another order.
        torch.testing.assert_close(plain(*arguments), module(*arguments), rtol=1e-5, atol=1e-5)


def test_exportable_detector_ignores_what_lies_under_padding(tmp_path: Path) -> None:
    make_checkpoint("dab_detr", tmp_path / "checkpoint.pth")
    detector = export.load_detector(tmp_path / "checkpoint.pth")
    exportable = ExportableDetector(detector.model)
    images, mask = torch.rand(2, 3, 64, 80), torch.zeros(2, 64, 80, dtype=torch.bool)
    mask[1, 40:] = True
    expected = verify.reference_runner(detector.model, None)(verify.Batch(images, mask, torch.tensor([[64, 80]] * 2)))
    images[1, :, 40:] = 7.0
    for name, value in exportable(images, mask).items():
        # The same operators on both sides, but the normalisation.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [33, 97, 128, 641, 800, 1333, 2047])
def test_resize_mask_picks_what_interpolate_picks(given: int) -> None:
    mask = torch.rand(2, given, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    for stride in (8, 16, 32, 64):
        size = (-(-given // stride), -(-40 // stride))
        expected = F.interpolate(mask[None].float(), size=size)[0].bool()
        assert torch.equal(resize_mask(mask, size), expected)


def outputs_of(boxes: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    return {"pred_boxes": boxes, "pred_logits": probabilities.logit()}


def test_differences_are_those_of_boxes_and_probabilities() -> None:
    boxes, probabilities = torch.rand(1, 5, 4), torch.rand(1, 5, 3) * 0.8 + 0.1
    expected, sizes = outputs_of(boxes, probabilities), torch.tensor([[10, 20]])
    moved = outputs_of(boxes.index_add(1, torch.tensor([2]), torch.full((1, 1, 4), 0.01)), probabilities - 0.02)
    found = verify.differences(expected, moved, sizes=sizes, any_order=False)
    assert found == {"boxes": pytest.approx(0.01, abs=1e-6), "probabilities": pytest.approx(0.02, abs=1e-6)}
    turned = {name: value.flip(1) for name, value in expected.items()}
    assert verify.differences(expected, turned, sizes=sizes, any_order=False)["boxes"] > 0.01
    assert verify.differences(expected, turned, sizes=sizes, any_order=True) == {"boxes": 0.0, "probabilities": 0.0}


def test_differences_of_detections_look_for_the_same_label_and_score() -> None:
    scores, labels = torch.tensor([[0.9, 0.5, 0.5, 0.1]]), torch.tensor([[1, 2, 0, 3]])
    boxes, sizes = torch.rand(1, 4, 4) * 10, torch.tensor([[10, 10]])
    expected = {"scores": scores, "labels": labels, "boxes": boxes}
    order = [0, 2, 1, 3]  # equal scores may change places
    equal = {"scores": scores, "labels": labels[:, order], "boxes": boxes[:, order]}
    assert verify.differences(expected, equal, sizes=sizes, any_order=False) == {"boxes": 0.0, "probabilities": 0.0}
    relabelled = equal | {"labels": labels}
    assert verify.differences(expected, relabelled, sizes=sizes, any_order=False)["boxes"] > 0.01


def test_check_refuses_what_differs_or_is_not_finite() -> None:
    batch = verify.Batch(torch.rand(1, 3, 8, 9), torch.zeros(1, 8, 9, dtype=torch.bool), torch.tensor([[8, 9]]))
    right = outputs_of(torch.rand(1, 5, 4), torch.full((1, 5, 3), 0.5))
    assert verify.check(lambda _: right, lambda _: right, [batch], any_order=False)["batches"] == [[1, 3, 8, 9]]
    for wrong in (right["pred_boxes"] + 1e-3, right["pred_boxes"] * torch.nan):
        with pytest.raises(ExportError, match="boxes differ by"):
            verify.check(lambda _: right, lambda _, w=wrong: right | {"pred_boxes": w}, [batch], any_order=False)


def test_select_of_the_example_equals_post_processing() -> None:
    pytest.importorskip("onnxruntime")
    from tools.examples import run_onnx

    logits, boxes = torch.randn(9, 4), torch.rand(9, 4)
    (expected,) = PostProcess(20)({"pred_logits": logits[None], "pred_boxes": boxes[None]}, torch.tensor([[30, 50]]))
    scores, labels, corners = run_onnx.select(logits.numpy(), boxes.numpy(), (30, 50), 20)
    np.testing.assert_array_equal(labels, expected["labels"])
    # float64 here, float32 there.
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-5)
    np.testing.assert_allclose(corners, expected["boxes"], atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--output model.pt2", "--format onnx writes .onnx files"),
        ("--output nowhere/model.onnx", "no folder nowhere"),
        ("--output model.onnx", "no checkpoint missing.pth"),
    ],
)
def test_export_refuses_with_a_sentence(
    flags: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trace, "ONNX_PACKAGES", ())
    assert export.main(["missing.pth", *flags.split()]) == 1
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "ONNX_PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ExportError, match="needs no_such_package: pip install no_such_package"):
        trace.require_onnx()


def test_side_limits_leave_two_rows_and_enough_tokens() -> None:
    args = main.parse_args([*SMALL.split(), "-m", "deformable_detr", "--with_box_refine", "--two_stage"])
    args.num_queries = 300
    smallest, largest = trace.side_limits(build_model(args)[0])
    # ResNet of three stages: maps of stride 8 and 16, two derived ones of 32 and 64.
    tokens = [sum((-(-side // stride)) ** 2 for stride in (8, 16, 32, 64)) for side in (smallest - 1, smallest)]
    assert tokens[0] <= 300 < tokens[1] and largest == trace.LARGEST_SIDE
