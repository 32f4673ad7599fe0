"""The Triton kernels: in Triton's interpreter where there is no GPU, and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.golden_recipe import TESTS_DIR
from tests.ms_deform_attn_cases import GOLDEN, assert_golden, random_problem, relative_error, run, run_plain

pytest.importorskip("triton")

# These take the interpreter half a minute; the others are of the same kinds.
LARGE = ("encoder_like", "four_levels_nonsquare", "four_levels_outside")


@pytest.mark.parametrize(
    "check",
    ["small_reference_numbers", "random_inputs", pytest.param("large_reference_numbers", marks=pytest.mark.slow)],
)
def test_interpreter(check: str) -> None:
    # In a process of its own: Triton decides when it is imported whether it interprets.
    code = f"import tests.test_ms_deform_attn_triton as t; t.check_{check}()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "MSDA_BACKEND": "triton"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS_DIR.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check_small_reference_numbers() -> None:
    """Compare with the reference numbers that are quick to interpret."""
    for case in GOLDEN:
        if case not in LARGE:
            assert_golden(case, torch.float64)


def check_large_reference_numbers() -> None:
    """Compare with the other reference numbers."""
    for case in LARGE:
        if case in GOLDEN:
            assert_golden(case, torch.float64)


def check_random_inputs() -> None:
    """Compare odd head sizes, half types, strange locations and empty tensors with plain PyTorch."""
    for channels in (1, 16, 33):
        p = random_problem([(3, 5), (1, 1)], queries=70, channels=channels, points=2).to(torch.float32)
        p.locations.view(-1)[::7] = float("nan")
        for actual, expected in zip(run(p), run_plain(p), strict=True):
            # A coordinate near 5 is known to 5e-7 in float32, and the gradient sums 33 channels.
            torch.testing.assert_close(actual, expected.nan_to_num(0.0), rtol=1e-4, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        p = random_problem([(3, 5)], channels=16).to(dtype, torch.float32)
        for actual, exact in zip(run(p), run_plain(p.to(torch.float64)), strict=True):
            # The interpreter cuts bfloat16 off instead of rounding it, so up to one unit in the last place.
            assert relative_error(actual, exact) < torch.finfo(dtype).eps
    for batch, queries in ((0, 3), (2, 0)):
        output, grad_value, *_ = run(random_problem([(2, 3)], batch=batch, queries=queries))
        assert output.shape == (batch, queries, 16)
        assert not grad_value.any()
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="no deterministic backward"):
        run(random_problem([(2, 3)]))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64"])
def test_kernels_compile_for_gpus(kind: str, capability: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    kernels = importlib.import_module("models.ops.triton_kernels")
    sums = "fp64" if kind == "fp64" else "fp32"
    constants: dict[str, Any] = {"LEVELS": 4, "POINTS": 4, "BLOCK_Q": 32, "BLOCK_D": 32}
    constants["SUM"] = triton.language.float64 if kind == "fp64" else triton.language.float32
    for kernel in (kernels._forward_kernel, kernels._backward_kernel):
        signature = dict.fromkeys(kernel.arg_names, f"*{sums}")
        signature |= dict.fromkeys(("value", "output", "grad_output"), f"*{kind}") | {"levels_ptr": "*i64"}
        signature |= dict.fromkeys(("tokens", "queries", "heads", "channels"), "i32")
        signature |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(
            kernel, {n: signature[n] for n in kernel.arg_names}, {n: constants[n] for n in constants}
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(compiled.asm["cubin"]) > 0
