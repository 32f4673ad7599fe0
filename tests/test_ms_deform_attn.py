"""The operator: arithmetic, checks, autograd, compilation, autocast and the choice of the backend."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from models.ops import backends, library, ms_deform_attn, use_backend
from tests.ms_deform_attn_cases import (
    GOLDEN,
    Problem,
    assert_golden,
    needs_cpu_library,
    random_problem,
    relative_error,
    run,
    run_plain,
)

LEVELS = [(4, 6), (3, 2), (1, 1)]
BACKENDS = [pytest.param("torch"), pytest.param("cpu", marks=needs_cpu_library)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per backend for CPU tensors."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Forget the chosen backend before and after the test."""
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN)
def test_operator_equals_reference_numbers(backend: str, case: str, dtype: torch.dtype) -> None:
    assert_golden(case, dtype)


@pytest.mark.parametrize("channels", [2, 33])
def test_gradcheck(backend: str, channels: int) -> None:
    p = random_problem(LEVELS, batch=1, queries=2, heads=2, channels=channels, points=2)
    leaves = [t.requires_grad_() for t in (p.value, p.locations, p.weights)]

    def call(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ms_deform_attn(value, p.shapes, p.starts, locations, weights)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend: str, dtype: torch.dtype) -> None:
    p = random_problem([(13, 17), (7, 9), (4, 5), (2, 3)], queries=50, heads=4, channels=32, points=4).to(dtype)
    exact = run_plain(p.to(torch.float64))
    # The rounding of the inputs is common to all three; what is compared is the error of the computation.
    for actual, plain, truth in zip(run(p), run_plain(p), exact, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, truth) <= 2 * relative_error(plain, truth) + torch.finfo(dtype).eps / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_take_float32_locations(backend: str, dtype: torch.dtype) -> None:
    p = random_problem(LEVELS, channels=16).to(dtype, torch.float32)
    output, grad_value, grad_locations, grad_weights = run(p)
    assert (output.dtype, grad_value.dtype, grad_locations.dtype, grad_weights.dtype) == (dtype,) * 2 + (
        torch.float32,
    ) * 2
    for actual, truth in zip(
        (output, grad_locations), (run_plain(p.to(torch.float64))[i] for i in (0, 2)), strict=True
    ):
        assert relative_error(actual, truth) < torch.finfo(dtype).eps  # one rounding of values, one of the result


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0, -0.6])
@pytest.mark.parametrize("channels", [8, 32])
def test_location_that_samples_nothing_gets_zero(backend: str, bad: float, channels: int) -> None:
    p = random_problem([(3, 1)], channels=channels)
    p.locations[..., 0, 0] = bad
    output, grad_value, grad_locations, grad_weights = run(p)
    rest = Problem(p.value, p.shapes, p.locations[..., 1:, :], p.weights[..., 1:], p.grad_output)
    expected = run(rest)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(grad_value, expected[1])
    assert not grad_locations[..., 0, :].any()
    assert not grad_weights[..., 0].any()


def test_nan_of_an_unsampled_token_stays_there(backend: str) -> None:
    p = random_problem([(4, 4)], channels=16)
    p.locations.uniform_(0.0, 0.5)  # touches the rows and columns 0 to 2 at most
    p.value[:, 15] = math.nan
    assert run(p)[0].isfinite().all()


def test_border_counts_the_outside_as_zero(backend: str) -> None:
    value = torch.arange(1.0, 7.0).view(1, 6, 1, 1)  # rows 1 2 3 and 4 5 6
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]]).view(1, 5, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(2, 3)], [0], corners, torch.ones(1, 5, 1, 1, 1))
    # At a corner of the map three of the four tokens lie outside; in the middle (2 + 5) / 2.
    torch.testing.assert_close(output.flatten(), torch.tensor([1 / 4, 3 / 4, 4 / 4, 6 / 4, 3.5]))


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0), (0, 0)])
def test_empty_batch_or_query(backend: str, batch: int, queries: int) -> None:
    p = random_problem(LEVELS, batch=batch, queries=queries)
    output, grad_value, *_ = run(p)
    assert output.shape == (batch, queries, 16)
    assert grad_value.shape == p.value.shape
    assert not grad_value.any()


def test_non_contiguous_inputs(backend: str) -> None:
    p = random_problem(LEVELS, channels=32)
    strided = Problem(
        p.value.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        p.shapes,
        p.locations.flip(-1).contiguous().flip(-1).transpose(1, 2).contiguous().transpose(1, 2),
        p.weights.repeat_interleave(2, -1)[..., ::2],
        p.grad_output[:, :, :1].expand_as(p.grad_output),
    )
    dense = Problem(p.value, p.shapes, p.locations, p.weights, strided.grad_output.contiguous())
    assert not strided.value.is_contiguous() and not strided.weights.is_contiguous()
    for actual, expected in zip(run(strided), run(dense), strict=True):
        assert torch.equal(actual, expected)


def test_inputs_stay_unchanged(backend: str) -> None:
    p = random_problem(LEVELS)
    before = [t.clone() for t in (p.value, p.locations, p.weights, p.grad_output)]
    run(p)
    assert all(map(torch.equal, before, (p.value, p.locations, p.weights, p.grad_output)))


def test_sizes_may_be_tensors_or_integers(backend: str) -> None:
    p = random_problem(LEVELS)
    tensors = (torch.tensor(p.shapes), torch.tensor(p.starts))
    expected = ms_deform_attn(p.value, p.shapes, p.starts, p.locations, p.weights)
    assert torch.equal(ms_deform_attn(p.value, *tensors, p.locations, p.weights), expected)


def test_second_derivative_is_refused(backend: str) -> None:
    p = random_problem(LEVELS)
    p.value.requires_grad_()
    output = ms_deform_attn(p.value, p.shapes, p.starts, p.locations.requires_grad_(), p.weights)
    (grad,) = torch.autograd.grad(output.sum(), p.value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "value axes": ({"value": torch.zeros(1, 31, 16)}, r"value of shape \(B, S, H, D\)"),
    "tokens": ({"value": torch.zeros(1, 30, 2, 8)}, "expected 31 tokens"),
    "heads": ({"value": torch.zeros(1, 31, 4, 8)}, "expected sampling_locations of shape"),
    "batch": ({"value": torch.zeros(3, 31, 2, 8)}, "expected sampling_locations of shape"),
    "coordinates": ({"locations": torch.zeros(1, 5, 2, 3, 3, 3)}, "expected sampling_locations of shape"),
    "levels": ({"shapes": [(4, 6), (7, 1)]}, "expected spatial_shapes of shape"),
    "empty level": ({"shapes": [(4, 6), (7, 1), (0, 5)]}, "at least one token"),
    "starts": ({"starts": [0, 24, 29]}, r"expected level_start_index \[0, 24, 30\]"),
    "weights": ({"weights": torch.zeros(1, 5, 2, 3, 2)}, "expected attention_weights of shape"),
    "integer value": ({"value": torch.zeros(1, 31, 2, 8, dtype=torch.int32)}, "expected value of one of"),
    "location type": ({"locations": torch.zeros(1, 5, 2, 3, 3, 2).double()}, "expected sampling_locations of type"),
    "weight type": ({"weights": torch.zeros(1, 5, 2, 3, 3).half()}, "expected attention_weights of type"),
    "size type": ({"shapes": torch.tensor(LEVELS, dtype=torch.int32)}, "torch.int64"),
    "device": ({"weights": torch.zeros(1, 5, 2, 3, 3, device="meta")}, "expected attention_weights on cpu"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_do_not_fit_raise(backend: str, wrong: str) -> None:
    change, message = WRONG[wrong]
    arguments: dict[str, Any] = {
        "value": torch.zeros(1, 31, 2, 8),
        "shapes": LEVELS,
        "starts": [0, 24, 30],
        "locations": torch.zeros(1, 5, 2, 3, 3, 2),
        "weights": torch.zeros(1, 5, 2, 3, 3),
    } | change
    with pytest.raises(RuntimeError, match=message):
        ms_deform_attn(*arguments.values())


def test_fake_tensors_are_checked_too() -> None:
    value, locations = torch.zeros(1, 31, 2, 8, device="meta"), torch.zeros(1, 5, 2, 3, 3, 2, device="meta")
    output = ms_deform_attn(value, LEVELS, [0, 24, 30], locations, torch.zeros(1, 5, 2, 3, 3, device="meta"))
    assert output.shape == (1, 5, 16) and output.device.type == "meta"
    with pytest.raises(RuntimeError, match="expected attention_weights of shape"):
        ms_deform_attn(value, LEVELS, [0, 24, 30], locations, torch.zeros(1, 5, 2, 3, 2, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    p = random_problem(LEVELS, channels=4).to(dtype, torch.float32)
    leaves = [t.requires_grad_() for t in (p.value, p.locations, p.weights)]
    arguments = (leaves[0], torch.tensor(p.shapes), torch.tensor(p.starts), leaves[1], leaves[2])
    torch.library.opcheck(torch.ops.dn_detr.ms_deform_attn.default, arguments)
    detached = tuple(a.detach() for a in arguments)
    torch.library.opcheck(torch.ops.dn_detr.ms_deform_attn_backward.default, (p.grad_output, *detached))


@pytest.mark.parametrize("as_tensors", [False, True])
def test_compile_has_no_graph_break(backend: str, as_tensors: bool) -> None:
    p = random_problem(LEVELS).to(torch.float32)
    shapes, starts = (torch.tensor(p.shapes), torch.tensor(p.starts)) if as_tensors else (p.shapes, p.starts)

    def double(value: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
        return 2 * ms_deform_attn(value, shapes, starts, locations, p.weights)

    value = p.value.requires_grad_()
    output = torch.compile(double, fullgraph=True, backend="aot_eager")(value, p.locations)
    output.backward(p.grad_output)
    expected = run(p)
    assert torch.equal(output, 2 * expected[0])
    assert value.grad is not None
    torch.testing.assert_close(value.grad, 2 * expected[1])


@pytest.mark.parametrize("value_type", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_keeps_the_type_of_value_and_the_accuracy_of_locations(backend: str, value_type: torch.dtype) -> None:
    p = random_problem(LEVELS).to(value_type, torch.float32 if value_type != torch.float64 else torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output, *grads = run(p)
    expected = run(p)
    assert output.dtype == value_type
    assert all(map(torch.equal, [output, *grads], expected))


def test_autocast_accepts_what_the_layers_produce(backend: str) -> None:
    p = random_problem(LEVELS).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ms_deform_attn(p.value, p.shapes, p.starts, p.locations, p.weights.bfloat16())
    expected = ms_deform_attn(p.value, p.shapes, p.starts, p.locations, p.weights.bfloat16().float())
    assert torch.equal(mixed, expected)


@pytest.mark.usefixtures("fresh_choice")
def test_environment_chooses_the_backend_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MSDA_BACKEND", "torch")
    with caplog.at_level(logging.INFO, "models.ops.backends"):
        run(random_problem(LEVELS))
        run(random_problem(LEVELS))
    assert [r.getMessage() for r in caplog.records] == [
        "ms_deform_attn on cpu: backend torch (asked for by MSDA_BACKEND or use_backend)"
    ]


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(
    ("name", "message"), [("fast", "expected MSDA_BACKEND to be one of"), ("cuda", "it computes cuda tensors only")]
)
def test_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("MSDA_BACKEND", name)
    with pytest.raises(RuntimeError, match=message):
        run(random_problem(LEVELS))


@pytest.mark.usefixtures("fresh_choice")
def test_without_a_library_the_operator_works_and_says_how_to_build(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MSDA_BACKEND", raising=False)
    monkeypatch.setattr(library, "obstacle", lambda name: f"no compiled library: {library.REBUILD}")
    with caplog.at_level(logging.INFO, "models.ops.backends"):
        run(random_problem(LEVELS))
    (record,) = caplog.records
    assert "backend torch" in record.getMessage() and "setup.py build" in record.getMessage()
