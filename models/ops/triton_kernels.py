"""Multi-scale deformable attention in Triton: no compiler needed beyond the one that torch brings.

One program computes a block of queries of one (image, head). Sums are kept in float32 (float64 for float64). The
backward pass adds to grad_value with atomics, in whatever order the GPU works, so its last bits vary from run to run.
"""

# The arguments of a kernel have types of Triton only, which it finds at run time.
# mypy: allow-untyped-defs

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import compute_dtype

# Elements of the (queries, channels) tile of one program: small enough for the registers of four warps.
TILE = 1024


def forward(value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the operator; arguments as in reference.forward."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, queries, heads = weights.shape[:3]
    output = value.new_empty(batch, queries, heads * value.shape[3])
    if output.numel():
        grid, sizes = _launch(value, level_shapes, weights)
        _forward_kernel[grid](value, locations, weights, output, **sizes)
    return output


def backward(
    grad_output: Tensor, value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients; arguments as in reference.backward.

    Raises:
        RuntimeError: torch is asked for deterministic algorithms, which atomics are not.
    """
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            "the triton backend of ms_deform_attn has no deterministic backward pass: build the CUDA kernels "
            "(`python models/ops/setup.py build`), set MSDA_BACKEND=torch, or allow nondeterministic algorithms"
        )
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    dtype = compute_dtype(value.dtype)
    grad_value = torch.zeros_like(value, dtype=dtype)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    if weights.numel():
        grid, sizes = _launch(value, level_shapes, weights)
        _backward_kernel[grid](
            grad_output.contiguous(), value, locations, weights, grad_value, grad_locations, grad_weights, **sizes
        )
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], weights: Tensor
) -> tuple[tuple[int], dict[str, Any]]:
    """Return the grid and the sizes a kernel needs."""
    _, tokens, heads, channels = value.shape
    batch, queries, _, levels, points = weights.shape
    block_channels = triton.next_power_of_2(channels)
    block_queries = max(1, TILE // block_channels)
    sizes = {
        "levels_ptr": _levels_on(tuple(level_shapes), value.device),
        "tokens": tokens,
        "queries": queries,
        "heads": heads,
        "channels": channels,
        "LEVELS": levels,
        "POINTS": points,
        "BLOCK_Q": block_queries,
        "BLOCK_D": block_channels,
        "SUM": tl.float64 if value.dtype == torch.float64 else tl.float32,
    }
    return (batch * heads * triton.cdiv(queries, block_queries),), sizes


@functools.lru_cache(maxsize=64)
def _levels_on(level_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return (L, 3) height, width and first token of each level; kept, because images repeat their sizes."""
    rows, start = [], 0
    for height, width in level_shapes:
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


@triton.jit
def _block(queries, heads, BLOCK_Q: tl.constexpr):
    """Return batch index, head index and the query indices of this program."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    return row // heads, row % heads, (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)


@triton.jit
def _sample(locations, weights, sample, query_mask, height, width, SUM: tl.constexpr):
    """Return pixel corner (x0, y0), the position in the pixel, the weight, and whether anything is sampled."""
    x = tl.load(locations + sample * 2, mask=query_mask, other=0.0).to(SUM) * width - 0.5
    y = tl.load(locations + sample * 2 + 1, mask=query_mask, other=0.0).to(SUM) * height - 0.5
    weight = tl.load(weights + sample, mask=query_mask, other=0.0).to(SUM)
    # False for NaN too; such a sample gets a harmless position.
    inside = query_mask & (x >= -1) & (y >= -1) & (x < width) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    x0 = tl.floor(x)
    y0 = tl.floor(y)
    return x0.to(tl.int64), y0.to(tl.int64), x - x0, y - y0, weight, inside


@triton.jit
def _forward_kernel(
    value,
    locations,
    weights,
    output,
    levels_ptr,
    tokens,
    queries,
    heads,
    channels,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):
    """Write the output of one block of queries of one head."""
    batch, head, query = _block(queries, heads, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    query_mask = query < queries
    channel_mask = channel < channels
    position = (batch * queries + query) * heads + head
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=SUM)
    for level in range(LEVELS):
        height = tl.load(levels_ptr + level * 3)
        width = tl.load(levels_ptr + level * 3 + 1)
        first_token = batch * tokens + tl.load(levels_ptr + level * 3 + 2)
        for point in range(POINTS):
            sample = (position * LEVELS + level) * POINTS + point
            x0, y0, fx, fy, weight, inside = _sample(locations, weights, sample, query_mask, height, width, SUM)
            for corner in tl.static_range(4):
                x = x0 + corner % 2
                y = y0 + corner // 2
                valid = inside & (x >= 0) & (y >= 0) & (x < width) & (y < height)
                part = weight * (fx if corner % 2 else 1 - fx) * (fy if corner // 2 else 1 - fy)
                row = ((first_token + y * width + x) * heads + head) * channels
                mask = valid[:, None] & channel_mask[None, :]
                token = tl.load(value + row[:, None] + channel[None, :], mask=mask, other=0.0).to(SUM)
                total += tl.where(valid, part, 0.0)[:, None] * token
    at = position[:, None] * channels + channel[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=query_mask[:, None] & channel_mask[None, :])


@triton.jit
def _backward_kernel(
    grad_output,
    value,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    levels_ptr,
    tokens,
    queries,
    heads,
    channels,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):
    """Write the gradients of locations and weights of one block of queries of one head, and add to grad_value."""
    batch, head, query = _block(queries, heads, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    query_mask = query < queries
    channel_mask = channel < channels
    position = (batch * queries + query) * heads + head
    at = position[:, None] * channels + channel[None, :]
    grad = tl.load(grad_output + at, mask=query_mask[:, None] & channel_mask[None, :], other=0.0).to(SUM)
    for level in range(LEVELS):
        height = tl.load(levels_ptr + level * 3)
        width = tl.load(levels_ptr + level * 3 + 1)
        first_token = batch * tokens + tl.load(levels_ptr + level * 3 + 2)
        for point in range(POINTS):
            sample = (position * LEVELS + level) * POINTS + point
            x0, y0, fx, fy, weight, inside = _sample(locations, weights, sample, query_mask, height, width, SUM)
            grad_x = tl.zeros((BLOCK_Q,), dtype=SUM)
            grad_y = tl.zeros((BLOCK_Q,), dtype=SUM)
            grad_weight = tl.zeros((BLOCK_Q,), dtype=SUM)
            for corner in tl.static_range(4):
                x = x0 + corner % 2
                y = y0 + corner // 2
                valid = inside & (x >= 0) & (y >= 0) & (x < width) & (y < height)
                part_x = fx if corner % 2 else 1 - fx
                part_y = fy if corner // 2 else 1 - fy
                row = ((first_token + y * width + x) * heads + head) * channels
                mask = valid[:, None] & channel_mask[None, :]
                element = row[:, None] + channel[None, :]
                token = tl.load(value + element, mask=mask, other=0.0).to(SUM)
                dot = tl.sum(token * grad, axis=1)
                grad_weight += part_x * part_y * dot
                grad_x += part_y * (dot if corner % 2 else -dot)
                grad_y += part_x * (dot if corner // 2 else -dot)
                share = tl.where(valid, weight * part_x * part_y, 0.0)
                tl.atomic_add(grad_value + element, share[:, None] * grad, mask=mask)
            scale = tl.where(inside, weight, 0.0)
            kind = grad_locations.dtype.element_ty
            tl.store(grad_locations + sample * 2, (scale * width * grad_x).to(kind), mask=query_mask)
            tl.store(grad_locations + sample * 2 + 1, (scale * height * grad_y).to(kind), mask=query_mask)
            tl.store(grad_weights + sample, grad_weight.to(grad_weights.dtype.element_ty), mask=query_mask)
