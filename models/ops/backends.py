"""Choose, once per kind of device, who computes the operator: compiled kernels, Triton or plain PyTorch.

`MSDA_BACKEND=auto|torch|cpu|cuda|triton` overrides the choice; one log line says which backend runs and why.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from . import library, reference

LevelShapes = Sequence[tuple[int, int]]
NAMES = ("auto", "torch", "cpu", "cuda", "triton")

_logger = logging.getLogger(__name__)
_requests: list[str] = []  # what the surrounding use_backend blocks asked for, innermost last


class Backend(NamedTuple):
    """One implementation of the operator.

    Attributes:
        name: one of NAMES but auto.
        forward: (value, level_shapes, locations, weights) -> (B, Q, H * D).
        backward: (grad_output, value, level_shapes, locations, weights) -> the three gradients.
    """

    name: str
    forward: Callable[[Tensor, LevelShapes, Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, LevelShapes, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def backend_for(device_type: str) -> Backend:
    """Return the backend for tensors of a device type ("cpu", "cuda", ...), choosing it at the first call.

    Raises:
        RuntimeError: MSDA_BACKEND names a backend that is unknown or cannot run on this device type here.
    """
    return _choose(_requests[-1] if _requests else os.environ.get("MSDA_BACKEND", "auto"), device_type)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute everything inside the block with the named backend, in all threads (for tests and measurements).

    Args:
        name: one of NAMES; one that cannot run raises RuntimeError at the first call of the operator.
    """
    _requests.append(name)
    try:
        yield
    finally:
        _requests.pop()


@functools.cache
def _choose(name: str, device_type: str) -> Backend:
    """Choose and announce the backend; the answer is kept for the life of the process."""
    if name not in NAMES:
        raise RuntimeError(f"expected MSDA_BACKEND to be one of {', '.join(NAMES)}, got {name!r}")
    if name == "auto":
        backend, why = _best(device_type)
    else:
        obstacle = _obstacle(name, device_type)
        if obstacle:
            raise RuntimeError(f"MSDA_BACKEND={name} cannot run on {device_type} tensors: {obstacle}")
        backend, why = _load(name), "asked for by MSDA_BACKEND or use_backend"
    _logger.info("ms_deform_attn on %s: backend %s (%s)", device_type, backend.name, why)
    return backend


def _best(device_type: str) -> tuple[Backend, str]:
    """Return the fastest backend that can run, and why it was taken."""
    candidates = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device_type, ())
    obstacles: list[str] = []
    for name in candidates:
        obstacle = _obstacle(name, device_type)
        if not obstacle:
            return _load(name), "; ".join(obstacles) or "the fastest"
        obstacles.append(f"{name}: {obstacle}")
    return _load("torch"), "; ".join(obstacles) or "the only one for this device"


def _obstacle(name: str, device_type: str) -> str:
    """Say why a backend cannot run on a device type; empty if it can."""
    if name in ("cpu", "cuda"):
        return library.obstacle(name) if name == device_type else f"it computes {name} tensors only"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "no module triton: install it or choose another backend"
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "without a GPU Triton needs TRITON_INTERPRET=1, set before Python starts"
    return ""


def _load(name: str) -> Backend:
    """Return the functions of a backend that has no obstacle."""
    if name == "torch":
        return Backend(name, reference.forward, reference.backward)
    if name == "triton":
        from . import triton_kernels  # Imported late: it brings in the Triton compiler.

        return Backend(name, triton_kernels.forward, triton_kernels.backward)
    return Backend(name, library.forward, library.backward)
