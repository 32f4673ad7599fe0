"""Pictures of what happens inside a detector, and their command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datasets import DatasetError
from tests.runs import write_pictures
from tests.test_visualize_capture import DENSE, LEVELED, SAMPLED, build
from tools.detector import load_detector
from tools.visualization.anchors import draw_anchors
from tools.visualization.attention import draw_attention, heat_map
from tools.visualization.capture import DenseAttention
from tools.visualization.denoising import draw_denoising, stored_noise, to_labels
from tools.visualization.drawing import choose_queries, draw_reference, make_panels, save, show_picture, write_text
from tools.visualize import main
from util.errors import OptionError

ANNOTATIONS = [{"bbox": [12, 10, 30, 20], "category_id": 1}, {"bbox": [30, 20, 10, 20], "category_id": 2}]


def picture() -> Image.Image:
    """Return a picture of 64 x 48 pixels."""
    torch.manual_seed(1)
    return Image.fromarray((torch.rand(48, 64, 3) * 255).to(torch.uint8).numpy())


def test_heat_map_keeps_the_share_of_every_level() -> None:
    fine, coarse = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)
    fine[0, 0, 0, 3], fine[1, 0, 1, 3] = 0.4, 0.4
    coarse[:, 0, 1, 0] = 0.6
    heat = heat_map(DenseAttention([fine, coarse]), 0)
    assert heat.sum().item() == pytest.approx(1)
    assert heat[0, 3].item() == pytest.approx(0.2) and heat[1, 3].item() == pytest.approx(0.2)
    assert torch.allclose(heat[2:, :2], torch.full((2, 2), 0.15))
    one_head = heat_map(DenseAttention([fine, coarse]), 0, slice(1, 2))
    assert one_head[1, 3].item() == pytest.approx(0.4) and one_head[0, 3] == 0
    # A coarse level of 3 rows over 4: rows weigh unequally, the level keeps its share all the same.
    odd = heat_map(DenseAttention([torch.zeros(1, 1, 4, 4), torch.full((1, 1, 3, 3), 1 / 9)]), 0)
    assert odd.sum().item() == pytest.approx(1)


def test_queries_are_the_best_or_those_asked_for() -> None:
    probabilities = torch.tensor([[0.1, 0.2], [0.9, 0.0], [0.3, 0.4]])
    assert choose_queries(probabilities, None, 2) == [1, 2]
    assert choose_queries(probabilities, None, 9) == [1, 2, 0]
    assert choose_queries(probabilities, [2, 0], 1) == [2, 0]
    with pytest.raises(OptionError, match="from 0 to 2, got 3"):
        choose_queries(probabilities, [3], 1)


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    gray = Image.new("RGB", (100, 50), (90, 90, 90))
    figure, axes = make_panels(1, 1, gray)
    show_picture(axes[0, 0], gray)
    place = draw_reference(axes[0, 0], torch.tensor([0.5, 0.5, 0.4, 0.4]), gray, "#ff0000", width=3)
    assert place == pytest.approx((30, 15))
    assert draw_reference(axes[0, 0], torch.tensor([0.1, 0.2]), gray, "#00ff00") == pytest.approx((10, 10))
    save(figure, tmp_path / "box.png")
    with Image.open(tmp_path / "box.png") as drawn:
        pixels = drawn.convert("RGB")

    def color(x: float, y: float) -> Any:
        # The panel fills the picture but for a border of 5 pixels and a frame of 1.
        return pixels.getpixel((round(6 + x * (pixels.width - 12)), round(6 + y * (pixels.height - 12))))

    assert color(0.3, 0.5) == color(0.5, 0.3) == color(0.7, 0.4) == (255, 0, 0)
    assert color(0.1, 0.2) == (0, 255, 0)
    assert color(0.5, 0.5) == color(0.9, 0.9) == (90, 90, 90)


def test_texts_stay_inside_and_apart() -> None:
    gray = Image.new("RGB", (200, 100))
    _, axes = make_panels(1, 1, gray)
    for _ in range(3):
        write_text(axes[0, 0], (195, -20), "a long name 0.50", "white", gray)
    xs, ys = zip(*(text.get_position() for text in axes[0, 0].texts), strict=True)
    assert min(ys) == 0 and max(xs) < 195
    assert sorted(ys)[1] - sorted(ys)[0] >= 10 and sorted(ys)[2] - sorted(ys)[1] >= 10


@pytest.mark.parametrize("options", [DENSE[1], LEVELED, SAMPLED[1], "deformable_detr"])
def test_pictures_of_every_kind_are_drawn(options: str, tmp_path: Path) -> None:
    detector = build(options)
    for name, draw in (("anchors", draw_anchors), ("attention", draw_attention)):
        chosen = draw(detector, picture(), tmp_path / f"{name}.png", count=2)
        assert len(chosen) == 2
        with Image.open(tmp_path / f"{name}.png") as drawn:
            assert drawn.width > 800  # at least three panels beside each other
    if options == "deformable_detr":
        with pytest.raises(OptionError, match="--use_dn"):
            draw_denoising(detector, picture(), ANNOTATIONS, tmp_path / "denoising.png")
        return
    draw_denoising(detector, picture(), ANNOTATIONS, tmp_path / "denoising.png", groups=2)
    with Image.open(tmp_path / "denoising.png") as drawn:
        rows = 4 if "--contrastive" in options else 2
        assert drawn.width > 800 and drawn.height > rows * 200
    with pytest.raises(OptionError, match="no known object"):
        draw_denoising(detector, picture(), [], tmp_path / "nothing.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a checkpoint as training does, and a data set; return their places."""
    folder = tmp_path_factory.mktemp("files")
    detector = build("dn_dab_detr --use_dn --scalar 2 --label_noise_scale 0.9")
    content = {"model": detector.model.state_dict(), "options": vars(detector.args)}
    torch.save(content | {"class_names": ["N/A", "leaf", "brick"]}, folder / "checkpoint.pth")
    data = write_pictures(folder / "data")
    return {"folder": folder, "checkpoint": folder / "checkpoint.pth", "data": data}


def test_command_line_draws(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, data = str(files["checkpoint"]), files["data"]
    one = str(data / "val2017" / "101.png")
    annotations = str(data / "annotations" / "instances_val2017.json")
    (tmp_path / "log.txt").write_text(
        "".join(json.dumps({"epoch": e, "test_instability": 3 - e}) + "\n" for e in (1, 2))
    )
    for name, arguments in {
        "a.png": ["anchors", checkpoint, one, "--queries", "5", "0"],
        "b.svg": ["attention", checkpoint, one, "--count", "1", "--head", "2"],
        "c.png": ["denoising", checkpoint, one, annotations],
        "d.png": ["denoising", checkpoint, "--coco_path", str(data), "--image_id", "101"],
        "e.png": ["instability", str(tmp_path)],
    }.items():
        assert main([*arguments, "--output", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 1000
        assert f"wrote {tmp_path / name}" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "b.svg").read_text()
    # Both ways of naming the picture give the same one.
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()


def test_labels_come_from_category_ids_or_names() -> None:
    detector = build("dab_detr")
    categories = [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}, {"id": 2, "name": "bird"}]
    dog, bird = {"category_id": 7}, {"category_id": 2}
    assert to_labels([dog], categories, detector) == [{"category_id": 2}]  # nobody knows the ids: by name
    assert to_labels([dog], categories, detector._replace(category_ids=[7, 9, 8])) == [{"category_id": 0}]
    with pytest.raises(DatasetError, match="'bird' is none of the detector's classes: cat, dog"):
        to_labels([bird], categories, detector)


def test_noise_is_that_of_the_run(files: dict[str, Path]) -> None:
    noise = stored_noise(str(files["checkpoint"]))
    detector = load_detector(files["checkpoint"], options=noise)
    model: Any = detector.model
    assert (model.denoising.num_groups, model.denoising.label_noise_scale) == (2, 0.9)
    louder = load_detector(files["checkpoint"], options=[*noise, "--label_noise_scale", "0.1"])
    assert louder.model.denoising.label_noise_scale == 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["anchors", "CHECKPOINT", "nowhere.jpg"], "cannot read the picture nowhere.jpg"),
        (["anchors", "nowhere.pth", "PICTURE"], "no checkpoint nowhere.pth"),
        (["anchors", "CHECKPOINT", "PICTURE", "--queries", "6"], "from 0 to 5, got 6"),
        (["attention", "CHECKPOINT", "PICTURE", "--count", "0"], "at least 1, got 0"),
        (["attention", "CHECKPOINT", "PICTURE", "--head", "4"], "--head from 0 to 3"),
        (["denoising", "CHECKPOINT", "PICTURE"], "expected IMAGE and ANNOTATION.json, or"),
        (["denoising", "CHECKPOINT", "PICTURE", "JSON", "--image_id", "3"], "expected IMAGE and ANNOTATION.json, or"),
        (["denoising", "CHECKPOINT", "--coco_path", "DATA", "--image_id", "3"], "image 3 is not listed"),
        (["denoising", "CHECKPOINT", "--coco_path", "DATA", "--image_id", "103"], "no known object"),
        (["instability", "DATA"], "no log.txt"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], words: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = files["data"]
    places = {
        "CHECKPOINT": files["checkpoint"],
        "PICTURE": data / "val2017" / "101.png",
        "JSON": data / "annotations" / "instances_val2017.json",
        "DATA": data,
    }
    argv = [str(places.get(argument, argument)) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--output", str(files["folder"] / "out.png")])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (files["folder"] / "out.png").exists()


@pytest.mark.parametrize("name", ["x.jpg", "nowhere/x.png"])
def test_output_is_checked_before_anything_is_computed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["instability", ".", "--output", name])
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["anchors", "attention", "denoising", "instability"])
def test_help_shows_an_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([kind, "--help"])
    assert f"python -m tools.visualize {kind} outputs/demo" in capsys.readouterr().out


def test_stored_noise_of_other_files_is_none(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": argparse.Namespace(use_dn=False, scalar=7)}, tmp_path / "a.pth")
    assert stored_noise(str(tmp_path / "a.pth")) == []
    assert stored_noise(str(tmp_path)) == []
