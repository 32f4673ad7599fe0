"""The deformable-attention operator: which backends run here, are they right, how fast are they?"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from models.ops import backends, ms_deform_attn, use_backend
from models.ops import test as self_test
from tools.benchmarks.ops import interleave

from .finding import ERROR, OK, WARNING, Finding

REBUILD = "python models/ops/setup.py build (or make build)"
# Head sizes and types of the self-test; `python models/ops/test.py` checks more of both.
CHANNELS = (32, 71)
DTYPES = (torch.float64, torch.float32)
# For the speed: the levels of a picture of 256 x 256 pixels.
LEVELS = [(32, 32), (16, 16), (8, 8), (4, 4)]
STARTS = [0, 1024, 1280, 1344]
ROUNDS = 3


def examine() -> list[Finding]:
    """Test and time every backend of every device, and say which one would run."""
    found = []
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        ready = []
        for name in ("torch", device, "triton"):
            obstacle = backends._obstacle(name, device)
            if obstacle:
                # Triton on a CPU is for tests, nobody misses it.
                worse = name == device
                remedy = REBUILD if worse else ""
                found.append(Finding(WARNING if worse else OK, f"{name} on {device}", f"not used: {obstacle}", remedy))
                continue
            result = _self_test(name, device)
            found.append(result)
            if result.mark == OK:
                ready.append(name)
        found += [_chosen(device), *_speed(ready, device)]
    return found


def _self_test(name: str, device: str) -> Finding:
    """Compare a backend with plain PyTorch in float64: output and gradients."""
    title, worst = f"{name} on {device}", 0.0
    try:
        with use_backend(name):
            for dtype in DTYPES:
                for channels in CHANNELS:
                    error = self_test.worst_error(ms_deform_attn, device, dtype, channels)
                    if not error <= self_test.TOLERANCES[dtype]:
                        text = f"wrong: relative error {error:.1e} in {dtype} with {channels} channels"
                        return Finding(ERROR, title, text, f"rebuild it: {REBUILD}; until then MSDA_BACKEND=torch")
                    worst = max(worst, error)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return Finding(ERROR, title, f"does not run: {reason}", f"rebuild it: {REBUILD}; until then MSDA_BACKEND=torch")
    return Finding(OK, title, f"right: output and gradients within {worst:.0e} of plain PyTorch in float64")


def _chosen(device: str) -> Finding:
    """Say which backend the models would use and why."""
    title, asked = f"backend for {device}", os.environ.get("MSDA_BACKEND", "auto")
    try:
        chosen = backends.backend_for(device)
    except RuntimeError as error:
        return Finding(ERROR, title, str(error), "unset MSDA_BACKEND, or choose one that can run")
    why = backends._best(device)[1] if asked == "auto" else "MSDA_BACKEND asks for it"
    return Finding(OK, title, f"{chosen.name} ({why})")


def _speed(names: list[str], device: str) -> list[Finding]:
    """Time forward and backward of an encoder layer on a small picture, all backends in turn."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    tokens = STARTS[-1] + LEVELS[-1][0] * LEVELS[-1][1]
    value = uniform(1, tokens, 8, 32).requires_grad_()
    locations, weights = uniform(1, tokens, 8, 4, 4, 2), uniform(1, tokens, 8, 4, 4)

    def run(name: str) -> None:
        with use_backend(name):
            ms_deform_attn(value, LEVELS, STARTS, locations, weights).sum().backward()

    calls = {name: lambda name=name: run(name) for name in names}
    seconds = {name: sorted(times)[len(times) // 2] for name, times in interleave(calls, ROUNDS, value.device).items()}
    text = ", ".join(f"{name} {time * 1e3:.1f} ms" for name, time in seconds.items())
    return [Finding(OK, f"speed on {device}", f"{text}; one layer over {tokens} tokens, forward and backward")]
