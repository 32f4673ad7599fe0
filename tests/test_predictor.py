"""A detector from its file alone, as a function from pictures to boxes."""

from __future__ import annotations

import argparse
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DatasetError
from models.compiling import CompiledForInference
from tests.runs import command
from tests.trained_files import evaluated, small_file
from tools.detector import load_detector
from tools.predictor import Detections, Predictor, read_picture
from util.checkpoint import load_checkpoint
from util.errors import CheckpointError, OptionError

pytest_plugins = ("tests.tiny_run",)


@pytest.mark.parametrize("ema", [True, False])
def test_predictor_finds_what_the_evaluation_finds(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: bool
) -> None:
    options = ["--eval", "--resume", tiny_checkpoint, *(["--ema"] if ema else [])]
    expected = evaluated(monkeypatch, *command(tiny_data, tmp_path, *options))
    predictor = Predictor(tiny_checkpoint, device="cpu", score_threshold=0, averaged=ema)
    assert predictor.detector.averaged == ema and predictor.category_ids == [1, 2] and len(expected) == 3
    for image_id, result in expected.items():
        found = predictor(tiny_data / "val2017" / f"{image_id}.png")
        # The same weights, pixels and operations: equal to the last bit, batches of one on both sides.
        np.testing.assert_array_equal(found.boxes_xyxy, result["boxes"].numpy())
        np.testing.assert_array_equal(found.scores, result["scores"].numpy())
        assert [predictor.category_ids[label] for label in found.labels] == result["labels"].tolist()
        assert set(found.names) <= {"leaf", "brick"}


def test_average_is_taken_as_the_run_evaluated_it(tiny_checkpoint: Path) -> None:
    content = load_checkpoint(tiny_checkpoint)
    for averaged, weights in ((None, content["ema"]["model"]), (False, content["model"])):
        detector = load_detector(tiny_checkpoint, averaged=averaged)
        assert torch.equal(detector.model.state_dict()["class_embed.bias"], weights["class_embed.bias"])
    assert not torch.equal(content["model"]["class_embed.bias"], content["ema"]["model"]["class_embed.bias"])


def test_every_kind_of_input_gives_the_same(tiny_checkpoint: Path, tiny_data: Path) -> None:
    predictor = Predictor(tiny_checkpoint, device="cpu", score_threshold=0)
    path = sorted((tiny_data / "val2017").iterdir())[0]
    picture = Image.open(path)
    pixels = np.array(picture)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    results = predictor([path, str(path), picture, pixels, tensor, tensor / 255])
    assert len(results) == 6 and len(results[0]) > 0
    for result in results[1:]:
        np.testing.assert_array_equal(result.boxes_xyxy, results[0].boxes_xyxy)
    assert results[0].boxes_xyxy.dtype == results[0].scores.dtype == np.float32 and results[0].labels.dtype == np.int64
    assert predictor([]) == []


def test_threshold_and_top_k_keep_the_best(tiny_checkpoint: Path, tiny_data: Path) -> None:
    path = sorted((tiny_data / "val2017").iterdir())[0]
    every = Predictor(tiny_checkpoint, device="cpu", score_threshold=0)(path)
    limit = float(every.scores[4])
    kept = Predictor(tiny_checkpoint, device="cpu", score_threshold=limit)(path)
    np.testing.assert_array_equal(kept.scores, every.scores[every.scores >= limit])
    np.testing.assert_array_equal(Predictor(tiny_checkpoint, device="cpu", score_threshold=0, top_k=2)(path).scores,
                                  every.scores[:2])  # fmt: skip


def test_mixed_precision_stays_near(tiny_checkpoint: Path, tiny_data: Path) -> None:
    path = sorted((tiny_data / "val2017").iterdir())[0]
    exact = Predictor(tiny_checkpoint, device="cpu", score_threshold=0)(path)
    rough = Predictor(tiny_checkpoint, device="cpu", score_threshold=0, amp=True, batch_size=2)([path, path])[0]
    assert not np.array_equal(rough.scores, exact.scores)
    # bfloat16 has 8 bits: relative steps of 0.4 %, some of which add up over the layers.
    np.testing.assert_allclose(rough.scores, exact.scores, rtol=0.05)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((4, 4), np.uint8), r"got \(4, 4\) uint8"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (torch.full((3, 4, 4), -1.0), "before it is normalised"),
        (torch.zeros((3, 4, 4), dtype=torch.int64), "torch.int64"),
        (Image.new("F", (4, 4)), "PIL mode F"),
        ("/nowhere/x.jpg", "/nowhere/x.jpg: cannot read the file"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture_is_named(source: Any, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        read_picture(source)


def test_predictor_refuses_settings_without_meaning(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="score threshold from 0 to 1"):
        Predictor(tiny_checkpoint, device="cpu", score_threshold=30)
    with pytest.raises(OptionError, match="expected 2 class names"):
        Predictor(tiny_checkpoint, device="cpu", class_names=["leaf"])


def test_official_file_has_coco_names_and_official_sizes(tmp_path: Path) -> None:
    detector = load_detector(small_file(tmp_path / "official.pth", num_classes=91, official=True))
    assert detector.class_names[17] == "cat" and detector.class_names[12] == "N/A"
    assert detector.category_ids == list(range(91)) and detector.args.modelname == "dab_detr"
    assert (detector.args.eval_scale, detector.args.data_aug_max_size) == (800, 1333)
    assert not detector.model.training and not any(p.requires_grad for p in detector.model.parameters())


def test_unknown_names_are_numbered(tmp_path: Path) -> None:
    file = small_file(tmp_path / "x.pth", num_classes=3, official=True)
    state = torch.random.get_rng_state()
    detector = load_detector(file)
    assert detector.class_names == ["class 0", "class 1", "class 2"]
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws nothing from the caller's random numbers


def test_bare_weights_need_the_model_named(tmp_path: Path) -> None:
    options = load_checkpoint(small_file(tmp_path / "x.pth", num_classes=3, official=False))["options"]
    torch.save({"model": load_checkpoint(tmp_path / "x.pth")["model"]}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="does not say which model"):
        load_detector(tmp_path / "bare.pth")
    names = ("backbone", "hidden_dim", "enc_layers", "dec_layers", "num_queries", "dim_feedforward")
    given = [text for name in names for text in (f"--{name}", str(options[name]))]
    assert len(load_detector(tmp_path / "bare.pth", options=["-m", "dab_detr", *given]).class_names) == 3


def test_part_of_a_detector_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "body.pth")
    with pytest.raises(CheckpointError, match="expected a whole detector"):
        load_detector(tmp_path / "body.pth", options=["-m", "dab_detr"])


def test_drawing_grows_with_the_picture() -> None:
    found = Detections(np.array([[0.2, 0.4, 0.8, 0.8]], np.float32), np.array([0.9], np.float32), np.array([1]),
                       ["a", "b"])  # fmt: skip
    widths, grounds = [], []
    for size in (200, 2000):
        picture = Image.new("RGB", (size, size))
        scaled = Detections(found.boxes_xyxy * size, found.scores, found.labels, found.class_names)
        drawn = np.array(scaled.draw(picture))
        assert not np.array(picture).any()  # the picture itself stays as it was
        widths.append(int((drawn[size * 6 // 10] == (0x56, 0xB4, 0xE9)).all(-1).sum()))
        grounds.append(int((drawn[: size * 4 // 10] == (0x56, 0xB4, 0xE9)).all(-1).sum()))  # of the text, above the box
    assert widths == [4, 14]  # two lines of 2, two of 7 pixels
    # Letters of 51 instead of 11 pixels, 21 times the area, of which letters and rounding take some.
    assert grounds[1] > 10 * grounds[0] > 0


def supervision_stub(**columns: Any) -> types.ModuleType:
    module = types.ModuleType("supervision")
    module.Detections = lambda **values: argparse.Namespace(**values, **columns)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("package", ["stub", "real"])
def test_detections_become_those_of_supervision(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package == "real":
        pytest.importorskip("supervision")
    else:
        monkeypatch.setitem(sys.modules, "supervision", supervision_stub())
        monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    boxes = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.5], np.float32), np.array([1, 0]), ["a", "b"]).to_supervision()
    np.testing.assert_array_equal(found.xyxy, boxes)
    assert found.class_id.tolist() == [1, 0] and found.data["class_name"].tolist() == ["b", "a"]
    assert found.confidence.tolist() == pytest.approx([0.9, 0.5])
    nothing = Detections(boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int64), ["a", "b"]).to_supervision()
    assert len(nothing.xyxy) == 0


def test_compiled_predictor_finds_the_same(
    tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graph as it was cut, run operation by operation.
    monkeypatch.setattr("models.inference.CompiledForInference", partial(CompiledForInference, backend="eager"))
    paths = sorted((tiny_data / "val2017").iterdir())[:2]
    plain, compiled = (
        Predictor(tiny_checkpoint, device="cpu", score_threshold=0, compile=each) for each in (False, True)
    )
    for expected, found in zip(plain(paths), compiled(paths), strict=True):
        np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(found.scores, expected.scores)
