"""The classic CUDA design of the operator, compiled on the spot: the baseline our GPU kernels are measured against."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("classic.cu")


def obstacle() -> str:
    """Say why the baseline cannot be built here; empty if it can."""
    return "" if find_nvcc() else "no nvcc in CUDA_HOME/bin or on the PATH"


def find_nvcc() -> str | None:
    """Return the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


@functools.cache
def kernels() -> ctypes.CDLL:
    """Compile the kernels for the GPU that is there, and load them.

    Raises:
        subprocess.CalledProcessError: nvcc failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "classic.so")
        major, minor = torch.cuda.get_device_capability()
        command = [find_nvcc() or "nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC"]
        subprocess.run([*command, "-shared", str(SOURCE), "-o", target], check=True)
        return ctypes.CDLL(target)


class ClassicAttention(torch.autograd.Function):
    """Multi-scale deformable attention of float32 CUDA tensors; the head size has to be a power of two."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """Compute (B, Q, H * D); levels: (L, 3) int64 height, width, first token on the GPU."""
        ctx.save_for_backward(value, levels, locations, weights)
        output = value.new_empty(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])
        call("classic_run_forward", value, weights, levels, value, locations, weights, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of value, locations and weights."""
        value, levels, locations, weights = ctx.saved_tensors
        grads = [torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)]
        grad_output = grad_outputs[0].contiguous()
        call("classic_run_backward", value, weights, levels, grad_output, value, locations, weights, *grads)
        return grads[0], None, grads[1], grads[2]


def call(name: str, value: Tensor, weights: Tensor, *arrays: Tensor) -> None:
    """Launch a kernel on the current stream.

    Raises:
        RuntimeError: the launch failed.
    """
    batch, queries, _, levels, points = weights.shape
    sizes = (ctypes.c_int64 * 7)(batch, *value.shape[1:], queries, levels, points)
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = getattr(kernels(), name)(sizes, *pointers, stream)
    if error:
        raise RuntimeError(f"{name} failed with CUDA error {error}: expected float32 tensors on one GPU")
