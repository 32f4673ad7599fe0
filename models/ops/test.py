"""Check every backend that can run here against plain PyTorch: `python test.py`.

Prints one line per check, `* True` or `* False`, and ends with exit code 1 if any check failed or none could run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHAPES = [(6, 4), (3, 2)]
STARTS = [0, 24]
HEADS, QUERIES, POINTS = 2, 2, 2
# The head sizes of the official test, then those of larger models and one beyond a block of threads.
CHANNELS = (30, 32, 64, 71, 16, 1, 1025)
# Norm of the error over the norm of the tensor, from the same rounded inputs: two units in the last place of a half
# type, because sums are kept in float32; in float32 a coordinate near 4 is known to 2e-7.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Check(NamedTuple):
    """One comparison: what is compared, and whether it holds."""

    name: str
    passed: bool
    error: float


def main() -> int:
    """Run all checks and return the exit code."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    ops = importlib.import_module("models.ops")
    passed = []
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        for backend in runnable(device):
            with ops.use_backend(backend):
                for check in checks(ops.ms_deform_attn, backend, device):
                    print(f"* {check.passed} {check.name}: relative error {check.error:.1e}")
                    passed.append(check.passed)
    print(f"{sum(passed)} of {len(passed)} checks passed")
    return 0 if passed and all(passed) else 1


def runnable(device: str) -> list[str]:
    """Return the backends that can run on a device, and print why the others cannot."""
    obstacle_of = importlib.import_module("models.ops.backends")._obstacle
    obstacles = {name: obstacle_of(name, device) for name in ("torch", device, "triton")}
    for name, obstacle in obstacles.items():
        if obstacle:
            print(f"- {name} on {device} not checked: {obstacle}")
    return [name for name, obstacle in obstacles.items() if not obstacle]


def checks(attention: Callable[..., Tensor], backend: str, device: str) -> Iterator[Check]:
    """Compare output and gradients in every type and head size, then the gradients with finite differences."""
    for dtype, tolerance in TOLERANCES.items():
        for channels in CHANNELS:
            error = worst_error(attention, device, dtype, channels)
            name = f"{backend} on {device}, {dtype}, {channels} channels, forward and backward"
            yield Check(name, error <= tolerance, error)
    for channels in CHANNELS[:4]:
        leaves = [t.requires_grad_() for t in inputs(device, torch.float64, channels)[:3]]
        arguments: Any = (leaves[0], SHAPES, STARTS, leaves[1], leaves[2])
        right = torch.autograd.gradcheck(attention, arguments, raise_exception=False)
        yield Check(f"{backend} on {device}, gradcheck, {channels} channels", right, 0.0 if right else float("nan"))


def worst_error(attention: Callable[..., Tensor], device: str, dtype: torch.dtype, channels: int) -> float:
    """Return the relative error of output and gradients against plain PyTorch in float64."""
    reference = importlib.import_module("models.ops.reference")
    value, locations, weights, grad = inputs(device, dtype, channels)

    def results(call: Callable[..., Tensor], kind: torch.dtype, *between: Any) -> list[Tensor]:
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (value, locations, weights)]
        output = call(leaves[0], *between, *leaves[1:])
        return [output, *torch.autograd.grad(output, leaves, grad.to(kind))]

    actual = results(attention, dtype, SHAPES, STARTS)
    expected = results(reference.forward, torch.float64, SHAPES)
    pairs = zip(actual, expected, strict=True)
    return max(float((a.detach().double() - e.detach()).norm() / e.detach().norm()) for a, e in pairs)


def inputs(device: str, dtype: torch.dtype, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw value, locations, weights and a gradient of the output; always the same numbers."""
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    tokens = sum(height * width for height, width in SHAPES)
    weights = uniform(1, QUERIES, HEADS, len(SHAPES), POINTS) + 1e-5
    weights = weights / weights.sum((-1, -2), keepdim=True)
    drawn = (
        uniform(1, tokens, HEADS, channels) - 0.5,
        uniform(1, QUERIES, HEADS, len(SHAPES), POINTS, 2),
        weights,
        uniform(1, QUERIES, HEADS * channels) - 0.5,
    )
    value, locations, weights, grad = (t.to(device, dtype) for t in drawn)
    return value, locations, weights, grad


if __name__ == "__main__":
    sys.exit(main())
