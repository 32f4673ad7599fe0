"""The comparison of compiled with eager detectors, at tiny sizes: that it runs, compares and reports; no times."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from models.compiling import CompiledForInference, compile_layers
from tools import benchmark
from tools.benchmarks import compile as compiling

TINY = [
    *("backbone=resnet18", "backbone_stages=3", "hidden_dim=32", "nheads=4", "enc_layers=1", "dec_layers=1"),
    *("dim_feedforward=32", "num_queries=10", "num_feature_levels=3"),
]


def test_benchmark_compile_command_fills_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Graphs run operation by operation: nothing waits for a compiler.
    monkeypatch.setattr(compiling, "compile_layers", functools.partial(compile_layers, backend="eager"))
    fast = functools.partial(CompiledForInference, backend="eager")
    monkeypatch.setattr("models.inference.CompiledForInference", fast)
    target = tmp_path / "figures.jsonl"
    argv = ["compile", "--inference", "deformable_detr", "--training", "dn_dab_deformable_detr", "--size", "64", "96"]
    argv += ["--rounds", "1", "--threads", str(torch.get_num_threads()), "--json", str(target), "--options", *TINY]
    assert benchmark.main(argv) == 0
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(records) == 2 * 2 * 2 and all(record["median"] > 0 for record in records)
    assert {record["ours"] for record in records} == {"compiled"}
    printed = capsys.readouterr().out
    assert "| training step, dn_dab_deformable_detr, bfloat16, 64 x 96, batch 2 | compiled | eager |" in printed
    assert printed.count("largest difference") == 4


def test_benchmark_compile_refuses_other_results() -> None:
    calls = {"eager": lambda: {"loss": torch.ones(())}, "compiled": lambda: {"loss": torch.ones(()) * 1.1}}
    with pytest.raises(AssertionError, match="not close"):
        compiling.compare_calls("step", "float32", calls, calls, None)  # type: ignore[arg-type]
