"""The comparisons of inference and attention, at tiny sizes: that they run, compare and report; no times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.layers.attention import attend, visible_keys
from tools import benchmark
from tools.benchmarks import attention, inference, scaling
from tools.benchmarks.ops import interleave

TINY: dict[str, Any] = {
    "backbone": "resnet18", "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_queries": 9, "num_labels": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", ["deformable_detr", "dab_detr"])
def test_inference_compares_with_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    build = inference.build_pair
    width = {"hidden_size": 64} if name == "dab_detr" else {"d_model": 64}
    monkeypatch.setattr(inference, "build_pair", lambda name: build(name, **TINY, **width))
    lines = tmp_path / "figures.jsonl"
    argv = ["inference", "--models", name, "--size", "64", "96", "--rounds", "1", "--json", str(lines)]
    assert benchmark.main([*argv, "--threads", str(torch.get_num_threads())]) == 0
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    pairs = [(record["ours"], record["baseline"]) for record in records]
    assert ("ours float32", "transformers float32") in pairs and ("ours bfloat16", "transformers float32") in pairs
    assert all(record["median"] > 0 for record in records)
    assert "off by at most" in capsys.readouterr().out


def test_inference_refuses_results_that_differ() -> None:
    def outputs(logit: float) -> dict[str, torch.Tensor]:
        return {"pred_logits": torch.full((1, 2, 3), logit), "pred_boxes": torch.zeros(1, 2, 4)}

    calls = {"transformers float32": lambda: outputs(0.0), "ours float32": lambda: outputs(0.01)}
    with pytest.raises(AssertionError, match="results differ"):
        inference.check("tiny", calls)


def test_inference_says_that_transformers_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert benchmark.main(["inference"]) == 1
    assert "pip install transformers" in capsys.readouterr().out


def test_attention_reports_time_and_saved_memory(tmp_path: Path) -> None:
    lines = tmp_path / "figures.jsonl"
    argv = ["attention", "--tokens", "128", "--rounds", "1", "--json", str(lines)]
    assert benchmark.main([*argv, "--threads", str(torch.get_num_threads())]) == 0
    records = {record["name"]: record for record in map(json.loads, lines.read_text().splitlines())}
    assert len(records) == 4
    kept = records["encoder attention, 128 tokens, kept for backward"]
    # Explicit: query, key, value and 8 x 128 x 128 weights.
    assert kept["baseline_value"] * 2**20 >= 4 * 8 * 128 * 128 and kept["median"] > 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 32), (64, 32)])
def test_attention_keeps_no_quadratic_tensor_for_backward(key_dim: int, value_dim: int, padded: bool) -> None:
    queries, tokens, heads = 100, 200, 8
    query = torch.randn(1, queries, heads * key_dim, requires_grad=True)
    key = torch.randn(1, tokens, heads * key_dim, requires_grad=True)
    value = torch.randn(1, tokens, heads * value_dim, requires_grad=True)
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[:, 150:] = True
    may_attend = visible_keys(mask) if padded else None
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixed = attend(query, key, value, num_heads=heads, may_attend=may_attend)
    # The largest things kept are as large as the keys; the weights are larger.
    assert max(sizes) <= tokens * heads * key_dim < queries * tokens * heads
    mixed.sum().backward()
    assert value.grad is not None and value.grad.shape == value.shape


@pytest.mark.parametrize("padding", [[], ["--padding"]])
def test_attention_compares_outputs_and_gradients_first(
    padding: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "figures.jsonl"
    argv = ["attention", "--tokens", "40", "--batch", "2", *padding, "--rounds", "1", "--json", str(lines)]
    assert benchmark.main([*argv, "--threads", str(torch.get_num_threads())]) == 0
    names = [json.loads(line)["name"] for line in lines.read_text().splitlines()]
    title = "attention, batch 2, 40 tokens with padding" if padding else "attention, batch 2, 40 tokens"
    assert [name for name in names if "forward" in name] == [
        f"{layer} {title}, forward + backward" for layer in ("encoder", "decoder")
    ]
    assert "| ours | explicit softmax |" in capsys.readouterr().out


def test_attention_that_ignores_padding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*args: Any, **options: Any) -> Any:
        return attend(*args, **options | {"may_attend": None})

    monkeypatch.setitem(attention.SIDES, "ours", careless)
    with pytest.raises(AssertionError):
        attention.measure("encoder", attention.make_inputs("encoder", 40, 2, True), 1, "wall")


def test_saved_bytes_counts_shared_memory_once() -> None:
    x = torch.randn(10, requires_grad=True)
    assert sum(attention.saved_bytes(lambda: x * x).values()) == 40
    weights = nn.Parameter(torch.randn(10))
    assert sum(attention.saved_bytes(lambda: x * weights).values()) == 80


def test_scaling_prints_a_table_and_draws_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["backbone=resnet18", "hidden_dim=32", "nheads=4", "dim_feedforward=48", "enc_layers=1", "dec_layers=1"]
    argv = ["scaling", "--models", "dab_detr", "--grow", "size", "--values", "48", "96", "--rounds", "1"]
    argv += ["--threads", str(torch.get_num_threads()), "--output", str(tmp_path), "--options", *sizes]
    assert benchmark.main(argv) == 0
    assert (tmp_path / "scaling_size.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "| dab_detr | 48 |" in printed and "| dab_detr | 96 |" in printed


def test_scaling_wants_one_thing_to_grow(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["scaling", "--values", "3"]) == 1
    assert "pass --grow" in capsys.readouterr().out
    assert set(scaling.GROWTH) == set(scaling.BASE) == set(scaling.AXES)


def test_clock_of_a_comparison_can_be_chosen() -> None:
    ticks = iter(range(100))
    seconds = interleave({"a": lambda: None, "b": lambda: None}, 2, torch.device("cpu"), lambda: float(next(ticks)))
    # Each call lasts from one reading of the clock to the next; the first round is not counted.
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]} and next(ticks) == 12
