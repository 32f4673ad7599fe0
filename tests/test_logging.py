"""Console, log files, progress, tables and TensorBoard scalars."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from util.environment import record_environment
from util.logger import METRIC_LOGGER, append_json_line, format_table, setup_logging
from util.progress import format_seconds, peak_memory_mib, progress_line, track
from util.reports import epoch_record, epoch_table, record_scalars, save_detections, save_precision, speed_stats


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_main_process_logs_to_console_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path)
    logging.getLogger("some.where").info("hello")
    logging.getLogger(METRIC_LOGGER).info("numbers")
    out = capsys.readouterr().out
    assert "hello" in out and "numbers" in out
    assert "hello" in (tmp_path / "info.txt").read_text() and "numbers" not in (tmp_path / "info.txt").read_text()


def test_save_log_keeps_metric_lines(tmp_path: Path) -> None:
    setup_logging(tmp_path, save_log=True)
    logging.getLogger(METRIC_LOGGER).info("numbers")
    assert "numbers" in (tmp_path / "info.txt").read_text()


def test_logging_set_up_twice_writes_once(tmp_path: Path) -> None:
    setup_logging(tmp_path)
    setup_logging(tmp_path)
    logging.getLogger().info("once")
    assert (tmp_path / "info.txt").read_text().count("once") == 1


def test_other_processes_log_to_their_files_and_warn_with_their_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path, rank=3)
    logging.getLogger().info("quiet")
    logging.getLogger().error("loud")
    captured = capsys.readouterr()
    assert captured.out == "" and "quiet" not in captured.err
    assert "rank 3: error: loud" in captured.err
    assert "quiet" in (tmp_path / "rank3.txt").read_text()


def test_python_warnings_are_logged(tmp_path: Path) -> None:
    setup_logging(tmp_path)
    warnings.warn("careful", stacklevel=1)
    assert "careful" in (tmp_path / "info.txt").read_text()


def test_json_lines_are_appended(tmp_path: Path) -> None:
    for epoch in range(2):
        append_json_line(tmp_path / "log.txt", {"epoch": epoch})
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        {"epoch": 0},
        {"epoch": 1},
    ]


def test_table_is_aligned() -> None:
    assert (
        format_table(("", "train"), [("loss", "1.0"), ("x", "10.0")])
        == "      train\n-----------\nloss    1.0\nx      10.0"
    )


def run_track(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Go through five items and return the metric lines."""
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger(METRIC_LOGGER), "info", lambda text, *args: lines.append(text % args))
    items = track(range(5), total=5, header="epoch 1", describe=lambda: "loss 2.0", every=2, stream=stream, **options)
    assert list(items) == [0, 1, 2, 3, 4]
    return lines


def test_progress_in_a_file_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    lines = run_track(stream, monkeypatch)
    assert stream.getvalue() == ""
    assert [line.split("  ")[:2] for line in lines] == [[f"epoch 1 {done}/5", "loss 2.0"] for done in (2, 4, 5)]
    assert all("it/s" in line and "MiB" in line and "left" in line for line in lines)


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    run_track(stream, monkeypatch)
    assert "epoch 1 [####################] 5/5" in stream.getvalue()
    assert "[########............] 2/5" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[K")


def test_progress_can_be_silent_but_still_reads() -> None:
    calls: list[int] = []

    def describe() -> str:
        calls.append(1)
        return ""

    assert list(track([1, 2], total=2, header="", describe=describe, every=1, show=False)) == [1, 2]
    assert len(calls) == 2


def test_console_on_a_terminal_leaves_metric_lines_to_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    setup_logging(None)
    logging.getLogger(METRIC_LOGGER).info("numbers")
    logging.getLogger().warning("hello")
    assert "numbers" not in stream.getvalue() and "hello" in stream.getvalue()


def test_progress_line_tells_rate_and_time_left() -> None:
    assert progress_line(10, 30, 5.0, "loss 1").startswith("10/30  loss 1  2.00 it/s  ")
    assert progress_line(10, 30, 5.0, "loss 1").endswith("0:00:10 left")
    assert format_seconds(3661.9) == "1:01:01"
    # A python process with torch takes more than 10 MiB and less than a TiB.
    assert 10 < peak_memory_mib() < 2**20


def test_epoch_record_has_official_names() -> None:
    record = epoch_record({"loss": 1.0}, {"coco_eval_bbox": [0.5]}, epoch=3, n_parameters=7, seconds=61)
    now = record.pop("now_time")
    assert len(now) == len("2000-01-01 00:00:00")
    assert record == {
        "train_loss": 1.0,
        "test_coco_eval_bbox": [0.5],
        "epoch": 3,
        "n_parameters": 7,
        "epoch_time": "0:01:01",
    }


def test_epoch_table_shows_losses_and_ap() -> None:
    table = epoch_table({"loss": 1.5}, {"loss": 2.0, "coco_eval_bbox": [0.123, 0.5, 0.1, -1.0, 0.2, 0.3] + [0.0] * 6})
    rows = [line.split() for line in table.splitlines()]
    assert ["loss", "1.5000", "2.0000"] in rows and ["AP", "12.3"] in rows and ["APs", "-"] in rows


def test_precision_file_loads_without_running_code(tmp_path: Path) -> None:
    params = argparse.Namespace(
        imgIds=np.arange(2), catIds=[1], iouThrs=np.ones(10), recThrs=np.ones(101), maxDets=[1, 10, 100],
        areaRng=[[0, 1e10]], iouType="bbox",
    )  # fmt: skip
    arrays = {name: np.full((10, 101, 1, 4, 3), 0.5) for name in ("precision", "scores")}
    evaluation = {
        "params": params,
        "counts": [10, 101, 1, 4, 3],
        "date": "now",
        "recall": np.ones((10, 1, 4, 3)),
        **arrays,
    }
    save_precision(evaluation, tmp_path / "eval.pth")
    loaded = torch.load(tmp_path / "eval.pth", weights_only=True)
    # As plotting tools of the official layout read it.
    assert loaded["precision"][0, :, :, 0, -1].mean(1).shape == (101,)
    assert loaded["params"]["imgIds"] == [0, 1] and loaded["recall"].sum() == 120


def test_scalars_of_a_record_are_losses_and_figures() -> None:
    record = {
        "train_loss": 1.0,
        "train_loss_ce_unscaled": 9.0,
        "test_coco_eval_bbox": [0.1] * 12,
        "epoch": 4,
        "note": "x",
    }
    scalars = record_scalars(record)
    assert scalars["train/loss"] == 1.0 and scalars["test/AP50"] == 0.1
    assert len(scalars) == 13


def test_detections_are_a_coco_results_file(tmp_path: Path) -> None:
    rows = [[1.23456, 2.0, 3.0, 4.0, 0.12345678, 7.0], [0.0, 0.0, 1.0, 1.0, 0.5, 2.0]]
    save_detections([(3, rows), (4, []), (9, rows[:1])], tmp_path / "detections.json")
    text = (tmp_path / "detections.json").read_text()
    entries = json.loads(text)
    assert entries[0] == {"image_id": 3, "category_id": 7, "bbox": [1.23, 2.0, 3.0, 4.0], "score": 0.123457}
    assert [entry["image_id"] for entry in entries] == [3, 3, 9]
    # One line per image with detections, between the brackets.
    assert len(text.splitlines()) == 4
    save_detections([(3, [])], tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_speed_of_an_epoch_without_a_step_is_left_out() -> None:
    assert speed_stats(10, 4.0)["images_per_second"] == 2.5
    stats = speed_stats(0, 0.1)
    assert "images_per_second" not in stats and stats["peak_memory_mib"] > 0


def test_environment_is_recorded_at_every_start(tmp_path: Path) -> None:
    for _ in range(2):
        record_environment(tmp_path, torch.device("cpu"))
    record_environment(None, torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["device"] == "cpu" and lines[0]["torch"].startswith(torch.__version__[:4])
    assert lines[0]["commit"] is None or len(lines[0]["commit"].removesuffix("-dirty")) == 40
