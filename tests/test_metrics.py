"""Running averages."""

from __future__ import annotations

import pytest
import torch

from util.metrics import MetricLogger, SmoothedValue, loss_stats


def test_smoothed_value_has_recent_and_global_figures() -> None:
    meter = SmoothedValue(window=3)
    for value in (1.0, 2.0, 6.0, 100.0):
        meter.update(value)
    assert (meter.median, meter.recent_mean, meter.global_mean) == (6.0, 36.0, 109 / 4)


def test_counts_of_zero_still_add_to_the_sum() -> None:
    meter = SmoothedValue()
    meter.update(3.0, 0)
    meter.update(5.0, 4)
    assert meter.global_mean == 2.0


def test_update_reads_nothing_until_asked() -> None:
    meters = MetricLogger()
    # A meta tensor has no value: any reading in `update` would fail.
    meters.update({"loss": torch.zeros((), device="meta")})
    with pytest.raises(NotImplementedError):
        meters.read()


def test_read_returns_the_newest_of_what_was_queued() -> None:
    meters = MetricLogger()
    meters.update({"a": torch.tensor(6.0), "b": torch.tensor(1.0)}, {"a": 3})
    meters.update({"a": torch.tensor(5.0)})
    assert meters.read() == {"a": 5.0, "b": 1.0}
    assert meters.read() == {}


def test_averages_divide_sums_by_counts() -> None:
    meters = MetricLogger()
    meters.update({"a": torch.tensor(6.0), "b": torch.tensor(1.0)}, {"a": 3})
    meters.update({"a": torch.tensor(2.0)})
    assert meters.averages() == {"a": 2.0, "b": 1.0}
    meters.synchronize()
    assert meters.averages() == {"a": 2.0, "b": 1.0}


def test_describe_shows_only_what_exists() -> None:
    meters = MetricLogger()
    meters.update({"loss_bbox": torch.tensor(0.5)})
    assert meters.describe(("loss", "loss_bbox"), {"loss_bbox": 5.0}) == "loss_bbox 2.5000 (2.5000)"


def test_loss_stats_have_official_names() -> None:
    stats = loss_stats({"loss": 7.0, "loss_ce": 2.0, "class_error": 50.0, "grad_norm": 1.0}, {"loss_ce": 3.0, "x": 1.0})
    assert stats == {
        "loss": 7.0,
        "grad_norm": 1.0,
        "class_error": 50.0,
        "loss_ce": 6.0,
        "loss_ce_unscaled": 2.0,
        "class_error_unscaled": 50.0,
    }
