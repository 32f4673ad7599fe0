"""Curves and pictures of predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.stand_ins import TinyData, TinyDetector, tiny_postprocess
from tools import plot
from util.curves import PANELS, read_log, run_names
from util.errors import OptionError
from util.plots import PIXEL_MEAN, PIXEL_STD, draw_examples, draw_predictions, plot_logs, to_picture


def write_log(folder: Path, records: list[dict[str, object]]) -> Path:
    """Write a log.txt and return its folder."""
    folder.mkdir()
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_log_of_a_resumed_run_has_each_epoch_once(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"epoch": 0, "a": 1},
        {"epoch": 1, "a": 2},
        {"test_loss": 1.0},
        {"epoch": 1, "a": 3},
    ]
    assert [record["a"] for record in read_log(write_log(tmp_path / "run", records))] == [1, 3]
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path)


def test_curves_of_two_runs_are_drawn(tmp_path: Path) -> None:
    folders = []
    for name, scale in (("one", 1.0), ("two", 2.0)):
        records: list[dict[str, object]] = [
            {"epoch": e, "train_loss": scale / (e + 1), "test_coco_eval_bbox": [e / 10, e / 5]} for e in range(3)
        ]
        folders.append(write_log(tmp_path / name, records))
    plot_logs(folders[:1], tmp_path / "one.png")
    plot_logs(folders, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.size == two.size == (1200, 700)
        assert one.tobytes() != two.tobytes()
        # matplotlib's second colour appears with the second run only.
        second = (255, 127, 14)
        assert second in {color for _, color in two.convert("RGB").getcolors(10**6)}
        assert second not in {color for _, color in one.convert("RGB").getcolors(10**6)}


def test_chosen_curves_are_drawn_as_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_log(tmp_path / "run", [{"epoch": 0, "train_lr": 1e-4}, {"epoch": 1, "train_lr": 1e-5}])
    picture = tmp_path / "curves.svg"
    assert plot.main([str(folder), "--output", str(picture), "--curves", "lr", "memory", "ap"]) == 0
    assert picture.read_text().lstrip().startswith("<?xml") and "wrote" in capsys.readouterr().out
    for wrong, words in ((["--output", "x.bmp"], ".svg"), (["--output", "x.png", "--curves", "no"], "invalid choice")):
        with pytest.raises(SystemExit):
            plot.main([str(folder), *wrong])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--output", "x.png"])
    assert "no log.txt" in capsys.readouterr().err


def test_points_leave_out_what_is_missing() -> None:
    records = [
        {"epoch": 0, "train_loss": 2.0, "epoch_time": "0:01:05", "test_coco_eval_bbox": [0.1, 0.2, 0.3, -1.0]},
        {"epoch": 1, "train_loss": float("nan"), "epoch_time": "1 day, 2:00:00"},
    ]
    assert PANELS["loss"].lines[0].points(records) == [(0, 2.0)]
    assert PANELS["time"].lines[0].points(records) == [(0, 65.0), (1, 93600.0)]
    assert PANELS["ap"].lines[1].points(records) == [(0, 20.0)]
    assert PANELS["sizes"].lines[0].points(records) == []


def test_runs_of_one_name_are_told_apart() -> None:
    assert run_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert run_names([Path("/a/x/one"), Path("/a/y/two")]) == ["one", "two"]


def test_broken_log_line_is_named(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", [{"epoch": 0}])
    with (folder / "log.txt").open("a") as file:
        file.write('{"epoch": 1, "tra')
    with pytest.raises(OptionError, match="line 2"):
        read_log(folder)


def test_picture_undoes_the_normalisation() -> None:
    pixels = torch.tensor([10, 128, 250], dtype=torch.float32)[:, None, None].expand(3, 2, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    assert to_picture((pixels - mean) / std).getpixel((1, 1)) == (10, 128, 250)


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    image = torch.zeros(3, 100, 100)
    target = {"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]), "labels": torch.tensor([1])}
    result = {
        "scores": torch.tensor([0.9, 0.1]),
        "labels": torch.tensor([0, 2]),
        "boxes": torch.tensor([[10.0, 40.0, 60.0, 90.0], [0.0, 0.0, 99.0, 99.0]]),
    }
    draw_predictions([image], [target], [result], ["a", "b"], tmp_path / "p.png", width=200)
    with Image.open(tmp_path / "p.png") as picture:
        pixels = picture.convert("RGB")
    background = pixels.getpixel((6 + 5, 24 + 195))
    assert pixels.getpixel((6 + 60, 24 + 100)) == (0x56, 0xB4, 0xE9)  # left edge of the true box, label 1
    assert pixels.getpixel((6 + 100, 24 + 100)) == background
    right = 200 + 12
    assert pixels.getpixel((right + 20, 24 + 120)) == (0xE6, 0x9F, 0x00)  # left edge of the prediction, label 0
    assert pixels.getpixel((right + 1, 24 + 100)) == background  # the one below the score is not drawn


def test_examples_of_a_data_set_are_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = TinyData(4)
    draw_examples(TinyDetector(), tiny_postprocess, data, torch.device("cpu"), tmp_path / "e.png", count=2)
    with Image.open(tmp_path / "e.png") as picture:
        # Two rows of 320 x 160 (images of 8 x 4 pixels), margins of 6, a title of 18.
        assert picture.size == (2 * 320 + 18, 18 + 2 * 166 + 6)
