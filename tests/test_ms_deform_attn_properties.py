"""The compiled CPU kernels against plain PyTorch on random shapes, and what must not depend on the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from models.ops import library, use_backend
from tests.golden_recipe import TESTS_DIR
from tests.ms_deform_attn_cases import GOLDEN, assert_golden, needs_cpu_library, random_problem, run, run_plain

pytestmark = needs_cpu_library

sides = st.integers(1, 7)
awkward = st.sampled_from([float("nan"), float("inf"), -1e30, -3.0, -0.5, 0.0, 1.0, 1.5, 7.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=5),
    batch=st.integers(0, 3),
    queries=st.integers(0, 40),
    heads=st.integers(1, 9),
    channels=st.integers(1, 129),
    points=st.integers(1, 5),
    strange=awkward,
    seed=st.integers(0, 2**16),
)
def test_random_shapes_agree_with_plain_pytorch(
    shapes: list[tuple[int, int]],
    batch: int,
    queries: int,
    heads: int,
    channels: int,
    points: int,
    strange: float,
    seed: int,
) -> None:
    p = random_problem(shapes, batch, queries, heads, channels, points, seed)
    p.locations.view(-1)[::7] = strange
    # Sums of at most 5 * 5 * 4 * 129 products in float64; measured below 1e-13.
    with use_backend("cpu"):
        actual = run(p)
    for got, expected in zip(actual, run_plain(p), strict=True):
        # Autograd leaves a NaN in the gradient of a NaN location; the operator defines zero.
        torch.testing.assert_close(got, expected.nan_to_num(0.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [7, 300])  # 300: tokens of a head are copied together first
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, queries: int) -> None:
    p = random_problem([(9, 8), (4, 4), (2, 1)], 2, queries, heads=3, channels=33, points=4).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                results.append(run(p))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_equals_reference_numbers(capability: str) -> None:
    code = "import tests.test_ms_deform_attn_properties as t; t.check_everything()"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "MSDA_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS_DIR.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().lower() in (capability, "no avx" if capability == "default" else capability)


def check_everything() -> None:
    """Compare golden numbers and odd head sizes; run in a process of its own, whose instruction set is chosen."""
    for case in GOLDEN:
        for dtype in (torch.float64, torch.float32):
            assert_golden(case, dtype)
    for channels in (1, 7, 31, 64, 129):
        p = random_problem([(5, 4), (2, 3)], channels=channels).to(torch.bfloat16, torch.float32)
        for got, expected in zip(run(p), run_plain(p), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)  # one rounding to bfloat16
    sys.stdout.write(torch.backends.cpu.get_cpu_capability())


def test_library_of_another_torch_is_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    content = library.library_path("cpu").read_bytes()
    mark = library.expected_mark().encode()
    other = mark.replace(b"torch-", b"torch-9", 1)[: len(mark)]
    assert mark in content
    foreign = library.Path(str(tmp_path)) / "foreign.so"
    foreign.write_bytes(content.replace(mark, other))
    monkeypatch.setattr(library, "library_path", lambda name: foreign)
    library.obstacle.cache_clear()
    try:
        reason = library.obstacle("cpu")
    finally:
        library.obstacle.cache_clear()
    assert "was built for torch-9" in reason and library.REBUILD in reason
