"""The measurements of training: equal results first, counts that are right, tables and plots that come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools import benchmark
from tools.benchmarks import loss, scaling_train, train
from tools.benchmarks.classic_model import classic_launches, explicit_attention
from tools.benchmarks.training_step import CountCalls, peak_bytes

TINY = [
    *("backbone=resnet18", "backbone_stages=3", "hidden_dim=32", "nheads=4", "enc_layers=1", "dec_layers=2"),
    *("dim_feedforward=32", "num_queries=10", "num_feature_levels=3", "batch_norm_type=BatchNorm2d"),
]
SIZE = ["--size", "48", "64", "--options", *TINY]


def lines(path: Path) -> list[dict[str, object]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("denoising", [False, True])
def test_benchmark_train_losses_of_both_ways_are_equal(denoising: bool) -> None:
    predictions = loss.make_predictions(2, 20, 3, denoising=denoising)
    loss.assert_equal(*loss.make_criteria(denoising=denoising), predictions)


def test_benchmark_train_unequal_losses_are_noticed() -> None:
    classic, ours = loss.make_criteria(denoising=False)
    ours.focal_alpha = 0.3
    with pytest.raises(AssertionError):
        loss.assert_equal(classic, ours, loss.make_predictions(2, 20, 3, denoising=False))


def test_benchmark_train_command_fills_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.jsonl"
    command = ["train", *SIZE, "--rounds", "1", "--threads", "1", "--json", str(target), "--clock", "process"]
    assert benchmark.main(command) == 0
    records = lines(target)
    assert len(records) == 3 + 2 + 1 + 4
    counts = {record["name"]: record for record in records}
    synchronisations = counts["synchronisations, log line of every step included"]
    assert synchronisations["ours_value"] == 2  # matching, and all numbers of the step, for its log line too
    assert synchronisations["baseline_value"] > 2
    calls = counts["aten calls, forward + loss + backward"]
    assert calls["baseline_value"] > calls["ours_value"] > counts["the same without views"]["ours_value"] > 100
    assert "| training step, dn_dab_deformable_detr |" in capsys.readouterr().out


def test_benchmark_train_step_that_computes_something_else_is_refused() -> None:
    parser = train.argparse.ArgumentParser()
    train.add_arguments(parser)
    step = train.make_step(parser.parse_args(SIZE))
    classic = step.classically()
    train.check_equal(classic, step)
    classic.criterion.alpha = 0.5
    with pytest.raises(AssertionError):
        train.check_equal(classic, step)


@pytest.mark.parametrize("model", ["dn_dab_deformable_detr", "dn_dab_dino_deformable_detr", "dn_dab_detr"])
def test_benchmark_train_classic_launches_compute_the_same(model: str) -> None:
    parser = train.argparse.ArgumentParser()
    train.add_arguments(parser)
    size = [each for each in SIZE if model != "dn_dab_detr" or "levels" not in each]
    step = train.make_step(parser.parse_args(["-m", model, *size]))
    classic = step.classically()
    with CountCalls() as fewer:
        expected = step.gradients()
    with classic_launches(), CountCalls() as more:
        torch.testing.assert_close(step.gradients(), expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert more.all > fewer.all
    with classic_launches():
        train.check_equal(classic, step)


def test_benchmark_train_explicit_attention_refuses_dropout() -> None:
    with pytest.raises(ValueError, match="expected no dropout"):
        explicit_attention(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4), num_heads=2, dropout=0.1)


def test_benchmark_train_scaling_draws_every_axis(tmp_path: Path) -> None:
    target = tmp_path / "points.jsonl"
    grow = ["--batch", "1", "2", "--objects", "1", "4", "--groups", "1", "3"]
    command = ["scaling_train", *SIZE, *grow, "--rounds", "1", "--threads", "1", "--plots", str(tmp_path)]
    assert benchmark.main([*command, "--json", str(target)]) == 0
    points = lines(target)
    assert [(point["axis"], point["value"]) for point in points] == [
        *(("batch", 1), ("batch", 2), ("objects", 1), ("objects", 4), ("groups", 1), ("groups", 3)),
    ]
    assert points[1]["peak_bytes"] > points[0]["peak_bytes"] > 0
    assert all(point[part] >= 0 for point in points for part in scaling_train.TIMES)
    for axis in scaling_train.AXES:
        path = tmp_path / f"scaling_train_{axis}.png"
        assert path.stat().st_size < 80_000 and Image.open(path).size == (720, 288)


def test_benchmark_train_calls_are_counted_with_and_without_views() -> None:
    with CountCalls() as counter:
        (torch.ones(3, 4).t() + 1).sum()
    assert counter.calls == {"ones": 1, "t": 1, "add": 1, "sum": 1}
    assert (counter.all, counter.computing) == (4, 3)


def test_benchmark_train_peak_is_the_most_memory_at_a_time() -> None:
    def call() -> None:
        first = torch.ones(1000, 1000)
        second = first + 1
        del first, second
        torch.ones(500, 1000)

    # Two matrices at a time, 4 bytes a number; small change for what torch allocates beside them.
    assert peak_bytes(call) == pytest.approx(8_000_000, rel=0.01)
