"""The command that detects: what it reads, what it writes, and files that cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import command
from tests.trained_files import evaluated
from tools import predict
from tools.prediction.inputs import find_inputs
from tools.prediction.video import AvFile, AvWriter, Cv2File, Cv2Writer
from tools.predictor import Detections
from util.checkpoint import load_checkpoint
from util.errors import OptionError

pytest_plugins = ("tests.tiny_run",)


def run(checkpoint: Path, *more: Any, status: int = 0) -> None:
    """Run the command on the CPU and check its exit status."""
    assert predict.main([str(checkpoint), *map(str, more), "--device", "cpu"]) == status


def test_five_hundred_pictures_and_a_broken_one(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(500):
        pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    (folder / "250_broken.png").write_bytes((folder / "250.png").read_bytes()[:200])
    options = ("--output", output, "--save", *predict.FORMATS, "--batch_size", 16, "--scale", 16, "--top_k", 2)
    run(tiny_checkpoint, folder, *options, "--score_threshold", 0, status=1)
    captured = capsys.readouterr()
    assert "1 of the inputs" in captured.err and captured.err.count("\n") == 2
    assert f"{folder / '250_broken.png'}: not a readable picture" in captured.err
    assert "500 pictures, 1000 objects" in captured.out
    names = [f"{number:03}.png" for number in range(500)]
    assert sorted(path.name for path in (output / "pictures").iterdir()) == names
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in lines] == names
    assert all((line["width"], line["height"], len(line["detections"])) == (20, 16, 2) for line in lines)
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1000 and rows[0]["class"] in ("leaf", "brick")
    best = lines[0]["detections"][0]
    assert [float(rows[0][side]) for side in ("left", "top", "right", "bottom")] == best["box_xyxy"]
    assert len(json.loads((output / "coco_results.json").read_text())) == 1000
    assert len(json.loads((output / "coco_images.json").read_text())["images"]) == 500


def test_fail_fast_stops_at_the_broken_file(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    run(tiny_checkpoint, tmp_path, "--output", tmp_path / "out", "--fail_fast", "--save", "csv", status=1)
    error = capsys.readouterr().err
    assert error.startswith("predict: error: ") and "a.png" in error and error.count("\n") == 1


def test_coco_results_give_the_average_precision_of_the_evaluation(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = tiny_data / "annotations" / "instances_val2017.json"
    run(tiny_checkpoint, tiny_data / "val2017", "--output", tmp_path, "--save", "coco", "--score_threshold", 0,
        "--image_ids", annotations)  # fmt: skip
    results = json.loads((tmp_path / "coco_results.json").read_text())
    expected = evaluated(
        monkeypatch, *command(tiny_data, tmp_path / "e", "--eval", "--ema", "--resume", tiny_checkpoint)
    )
    for image_id, result in expected.items():
        own = [entry for entry in results if entry["image_id"] == image_id]
        assert [entry["category_id"] for entry in own] == result["labels"].tolist()
        boxes = torch.tensor([entry["bbox"] for entry in own])
        boxes[:, 2:] += boxes[:, :2]
        # Written in thousandths of a pixel: half of one for the corner and half for the size.
        torch.testing.assert_close(boxes, result["boxes"], rtol=0, atol=1.1e-3)
    listed = json.loads((tmp_path / "coco_images.json").read_text())
    assert listed["categories"] == [{"id": 1, "name": "leaf"}, {"id": 2, "name": "brick"}]
    assert sorted(image["id"] for image in listed["images"]) == sorted(expected)


def test_category_ids_nobody_knows_are_not_invented(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_checkpoint(tiny_checkpoint)
    del content["category_ids"], content["class_names"]
    torch.save(content, tmp_path / "old.pth")
    run(tmp_path / "old.pth", tiny_data / "val2017", "--output", tmp_path, "--save", "coco", status=1)
    assert "pass --class_names with the COCO annotations" in capsys.readouterr().err
    names = tiny_data / "annotations" / "instances_val2017.json"
    options = ("--output", tmp_path, "--score_threshold", 0, "--save", "coco", "csv")
    run(tmp_path / "old.pth", tiny_data / "val2017", *options, "--class_names", names)
    assert {entry["category_id"] for entry in json.loads((tmp_path / "coco_results.json").read_text())} <= {1, 2}
    assert ",leaf,0," in (tmp_path / "predictions.csv").read_text()


def test_class_names_come_from_a_text_file(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("Blatt\nZiegel\n", encoding="utf-8")
    options = ("--output", tmp_path, "--score_threshold", 0, "--save", "csv", "--class_names", tmp_path / "names.txt")
    run(tiny_checkpoint, tiny_data / "val2017", *options)
    assert ",Blatt,0," in (tmp_path / "predictions.csv").read_text()
    (tmp_path / "names.txt").write_text("Blatt\n", encoding="utf-8")
    run(tiny_checkpoint, tiny_data / "val2017", *options, status=1)
    assert "expected 2 lines" in capsys.readouterr().err
    (tmp_path / "names.txt").unlink()
    run(tiny_checkpoint, tiny_data / "val2017", *options, status=1)
    assert "cannot read --class_names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["nowhere.jpg"], "no picture or video"),
        (["empty"], "or pass --recursive"),
        (["*.tiff"], "no picture or video"),
    ],
)
def test_inputs_that_name_nothing_are_told(
    tiny_checkpoint: Path, tmp_path: Path, inputs: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    run(tiny_checkpoint, *(tmp_path / name for name in inputs), "--output", tmp_path / "out", status=1)
    error = capsys.readouterr().err
    assert error.startswith("predict: error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_inputs_are_found_once_and_named_apart(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/deep/1.jpg", "b/1.png", "a/out/old.jpg", "a/notes.txt", "b/film.MP4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    flat = find_inputs([str(tmp_path / "a"), str(tmp_path / "a" / "1.jpg")])
    assert [str(item.name) for item in flat] == ["1.jpg"]
    deep = find_inputs(
        [str(tmp_path / "a"), str(tmp_path / "b" / "*")], recursive=True, leave_out=tmp_path / "a" / "out"
    )
    assert [str(item.name) for item in deep] == ["1.jpg", "deep/1.jpg", "1_2.png", "film.MP4"]
    assert [item.is_video for item in deep] == [False, False, False, True]


def test_missing_packages_are_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install supervision"):
        Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0), []).to_supervision()  # type: ignore[arg-type]
    (tmp_path / "film.mp4").touch()
    run(tiny_checkpoint, tmp_path / "film.mp4", "--output", tmp_path, status=1)
    assert "pip install av" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "reader", "writer"), [("av", AvFile, AvWriter), ("cv2", Cv2File, Cv2Writer)])
def test_video_frames_are_detected_and_drawn(
    package: str, reader: Any, writer: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip(package)
    monkeypatch.setattr("tools.prediction.video.video_package", lambda: package)
    monkeypatch.setattr("tools.predict.video_package", lambda: package)
    film = writer(tmp_path / "film.mp4", rate=5.0)
    for level in (0, 100, 200):
        film.add(Image.new("RGB", (64, 48), (level, level, level)))
    film.close()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    options = ("--output", tmp_path / "out", "--score_threshold", 0, "--top_k", 1, "--save", *predict.FORMATS)
    run(tiny_checkpoint, tmp_path, *options, status=1)
    assert "broken.mp4: not a readable video" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2] and lines[0]["width"] == 64
    images = json.loads((tmp_path / "out" / "coco_images.json").read_text())["images"]
    assert [(image["id"], image["frame"]) for image in images] == [(1, 0), (2, 1), (3, 2)]
    drawn = reader(tmp_path / "out" / "pictures" / "film.mp4")
    frames = list(drawn.frames())
    assert len(frames) == 3 and frames[0].size == (64, 48) and drawn.rate == pytest.approx(5.0)
