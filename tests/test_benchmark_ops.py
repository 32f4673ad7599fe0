"""The operator's benchmark: what it feeds, what it counts and what it writes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tools import benchmark
from tools.benchmarks import all as all_kinds
from tools.benchmarks import ops


def test_encoder_shapes_are_those_of_the_model() -> None:
    inputs = ops.make_inputs("encoder", 1, torch.float32, torch.device("cpu"))
    assert inputs.value.shape == (1, 17821, 8, 32)
    assert inputs.locations.shape == (1, 17821, 8, 4, 4, 2)
    # Queries sit on their tokens: the first in the corner of level 0, up to offsets of a few tokens.
    assert float(inputs.locations[0, 0].mean(0)[0].max()) < 0.1


def test_benchmark_writes_one_record_per_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "SHAPES", [(4, 5), (2, 3), (1, 2), (1, 1)])
    monkeypatch.setattr(ops, "STARTS", [0, 20, 26, 28])
    target = tmp_path / "figures.json"
    command = ["ops", "--device", "cpu", "--one_process", "--rounds", "1", "--batches", "1", "--layers", "encoder"]
    assert benchmark.main([*command, "--threads", str(torch.get_num_threads()), "--json", str(target)]) == 0
    records = [json.loads(line) for line in target.read_text().splitlines()]
    names = ops.available("cpu")
    assert [r["backend"] for r in records] == names * 2
    assert [r["backward"] for r in records] == [False] * len(names) + [True] * len(names)
    assert records[0]["ratio"] == 1.0 and all(r["seconds"][0] > 0 for r in records)
    assert "encoder, batch 1, forward + backward" in capsys.readouterr().out


def test_necessary_bytes_counts_every_array_once() -> None:
    zeros = torch.zeros
    inputs = ops.Inputs(zeros(1, 3, 2, 4), zeros(1, 5, 2, 1, 1, 2), zeros(1, 5, 2, 1, 1), zeros(1, 5, 8))
    forward = 4 * (24 + 20 + 10 + 40)
    assert ops.necessary_bytes(inputs, backward=False) == forward
    assert ops.necessary_bytes(inputs, backward=True) == 2 * forward + 4 * (24 + 20 + 10)


def test_benchmark_all_runs_each_kind_and_tells_which_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, returncode=int(command[2] == "data"))

    monkeypatch.setattr(subprocess, "run", run)
    folder = ["--folder", str(tmp_path / "figures")]
    assert benchmark.main(["all", "--coco_path", "cells", "--kinds", "loss", "data", *folder]) == 1
    assert commands == [
        ["loss", "--json", str(tmp_path / "figures" / "loss.jsonl")],
        ["data", "--coco_path", "cells", "--json", str(tmp_path / "figures" / "data.jsonl")],
    ]
    assert capsys.readouterr().out.endswith("failed: data\n")
    assert set(benchmark.KINDS) == {*all_kinds.KINDS, "scaling", "scaling_train", "compile", "all"}
