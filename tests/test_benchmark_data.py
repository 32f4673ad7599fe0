"""The data and eval benchmarks: both sides compute the same, and a difference is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.transforms import EvalTransform
from tests.dataset_helpers import annotation, instances, write_split
from tools import benchmark
from tools.benchmarks import data, eval


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    content = instances(4)
    content["images"][1].update(width=30, height=40)
    content["annotations"] += [annotation(20, 1, iscrowd=1), annotation(21, 2, bbox=[25, 30, 50, 50], area=7.0)]
    write_split(root, "train", content)
    write_split(root, "val", instances(1, first_id=101))
    for entry in content["images"]:
        y, x = np.mgrid[: entry["height"], : entry["width"]]
        waves = np.stack([127 + 120 * np.sin((x + y * k) / 9) for k in (0, 1, 2)], -1)
        Image.fromarray(waves.astype(np.uint8)).save(root / "train2017" / entry["file_name"])
    return root


def test_data_compares_equal_pipelines_and_counts_padding(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    arguments = ["--images", "2", "--rounds", "1", "--padding_epochs", "1", "--threads", str(threads)]
    assert benchmark.main(["data", "--coco_path", str(root), *arguments, "--json", str(tmp_path / "out.json")]) == 0
    output = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [record["ours"] for record in records] == ["pil", "pil, and normalised", "torch", "torch, and normalised"]
    assert [record["required"] for record in records] == [None, None, 4.0, None]
    assert "images per second" in output
    assert output.count("padding in batches of 2") == 2


@pytest.mark.parametrize("backend", ["pil", "torch"])
def test_data_notices_a_wrong_target(root: Path, backend: str) -> None:
    ours, official = data.open_data(str(root), backend), data.OfficialPipeline(data.open_data(str(root), "pil"))
    data.assert_equal([[0, 1], [2, 3]], official, ours, data.PIXEL_TOLERANCE[backend])
    official.coco.imgToAnns[official.ids[0]][0]["bbox"] = [3, 3, 5, 5]
    with pytest.raises(AssertionError):
        data.assert_equal([[0, 1]], official, ours, data.PIXEL_TOLERANCE[backend])


def test_eval_compares_equal_figures(capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert benchmark.main(["eval", "--images", "4", "--detections", "20", "--rounds", "1", "--threads", threads]) == 0
    assert "12 figures equal" in capsys.readouterr().out


def test_eval_stops_when_the_figures_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval, "evaluate_ours", lambda coco, predictions: np.zeros(12))
    threads = str(torch.get_num_threads())
    with pytest.raises(SystemExit, match="figures differ"):
        benchmark.main(["eval", "--images", "4", "--detections", "20", "--rounds", "1", "--threads", threads])


@pytest.mark.parametrize("side", ["ours", "baseline"])
def test_eval_tells_the_memory_of_one_side(side: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert benchmark.main(["eval", "--images", "2", "--memory", side, "--threads", threads]) == 0
    assert f"{side}: AP" in capsys.readouterr().out


def test_grouping_removes_the_padding_between_orientations() -> None:
    sizes = [(640, 480), (480, 640)] * 8
    transform = EvalTransform(scale=480)
    # A wide image beside a tall one: 480 x 640 of 640 x 640 is used.
    assert data.padding(sizes, transform, 16, 1, False) == pytest.approx(0.25)
    assert data.padding(sizes, transform, 8, 1, True) == 0
