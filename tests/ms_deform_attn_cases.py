"""Inputs, reference numbers and error measures that the tests of multi-scale deformable attention share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from models.ops import library, ms_deform_attn, reference
from tests.golden_recipe import TESTS_DIR

Shapes = Sequence[tuple[int, int]]
FILE = "golden/ops/ms_deform_attn.npz"

needs_cpu_library = pytest.mark.skipif(bool(library.obstacle("cpu")), reason=library.obstacle("cpu") or "it is here")


class Problem(NamedTuple):
    """The arguments of one call, and a gradient of its output."""

    value: Tensor
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    grad_output: Tensor

    @property
    def starts(self) -> list[int]:
        """First token of every level."""
        return [sum(h * w for h, w in self.shapes[:level]) for level in range(len(self.shapes))]

    def to(self, dtype: torch.dtype, sum_dtype: torch.dtype | None = None, device: str = "cpu") -> Problem:
        """Convert value and gradient to dtype, locations and weights to sum_dtype (default: dtype)."""
        return Problem(
            self.value.to(device, dtype),
            self.shapes,
            self.locations.to(device, sum_dtype or dtype),
            self.weights.to(device, sum_dtype or dtype),
            self.grad_output.to(device, dtype),
        )


def run(problem: Problem) -> list[Tensor]:
    """Return output and gradients of value, locations and weights, computed by the operator."""
    leaves = [t.detach().requires_grad_() for t in (problem.value, problem.locations, problem.weights)]
    output = ms_deform_attn(leaves[0], problem.shapes, problem.starts, leaves[1], leaves[2])
    output.backward(problem.grad_output)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def run_plain(problem: Problem) -> list[Tensor]:
    """Return the same from plain PyTorch and its autograd."""
    leaves = [t.detach().requires_grad_() for t in (problem.value, problem.locations, problem.weights)]
    output = reference.forward(leaves[0], problem.shapes, leaves[1], leaves[2])
    output.backward(problem.grad_output)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def random_problem(
    shapes: Shapes, batch: int = 2, queries: int = 5, heads: int = 2, channels: int = 8, points: int = 3, seed: int = 0
) -> Problem:
    """Draw float64 inputs; a third of the locations lies outside."""
    rs = np.random.RandomState(seed)
    tokens = sum(h * w for h, w in shapes)
    draw = [
        rs.standard_normal((batch, tokens, heads, channels)),
        rs.uniform(-0.3, 1.3, (batch, queries, heads, len(shapes), points, 2)),
        rs.uniform(0.0, 1.0, (batch, queries, heads, len(shapes), points)),
        rs.standard_normal((batch, queries, heads * channels)),
    ]
    value, locations, weights, grad_output = map(torch.from_numpy, draw)
    return Problem(value, list(shapes), locations, weights, grad_output)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return the L2 norm of the error over that of the exact tensor."""
    if not exact.numel():
        return 0.0
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


def load_reference() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the reference numbers: all of them beside the repository, else the selection kept with the tests."""
    full = TESTS_DIR.parent.parent / "shared" / FILE
    with np.load(full if full.is_file() else TESTS_DIR / FILE, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, json.loads(str(arrays["meta"]))


ARRAYS, META = load_reference()
GOLDEN = sorted(META["cases"])


def golden_problem(case: str) -> Problem:
    """Return the float64 inputs of a reference case."""
    names = ("value", "sampling_locations", "attention_weights", "grad_output")
    value, locations, weights, grad_output = (torch.from_numpy(ARRAYS[f"{case}/in/{name}"]) for name in names)
    return Problem(value, [(h, w) for h, w in META["cases"][case]["spatial_shapes"]], locations, weights, grad_output)


def assert_golden(case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare output and gradients with the float64 reference numbers.

    Float64 differs by the order of a few dozen additions (1e-12). In float32 a coordinate near 10 is known to 1e-6,
    and the gradient of a location multiplies that by the level size and a sum over up to 71 channels.
    """
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    problem = golden_problem(case).to(dtype, device=device)
    for name, actual in zip(("output", "value", "sampling_locations", "attention_weights"), run(problem), strict=True):
        expected = torch.from_numpy(ARRAYS[f"{case}/f64/{name if name == 'output' else 'grad_' + name}"])
        torch.testing.assert_close(
            actual.cpu().double(), expected, rtol=tolerance, atol=tolerance, msg=f"{case} {name}"
        )
