"""Multi-scale deformable attention as one operator of torch: schema, checks, shapes, autograd, autocast.

Deformable DETR, ICLR 2021. `reference.py` defines the arithmetic, `backends.py` decides who computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import backend_for

HALF_TYPES = (torch.float16, torch.bfloat16)
VALUE_TYPES = (torch.float64, torch.float32, *HALF_TYPES)
ARGUMENTS = (
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights"
)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample every level at the given locations and sum the samples with the given weights.

    Args:
        value: (B, S, H, D) tokens of all levels, one level after the other; float64, float32, float16 or bfloat16.
        spatial_shapes: (h, w) of each of the L levels. Python integers or a CPU tensor (L, 2) of int64 are best: a
            tensor on the GPU has to be copied to the host, which waits for the GPU.
        level_start_index: (L,) index of the first token of each level: 0, h0 * w0, h0 * w0 + h1 * w1, ...
        sampling_locations: (B, Q, H, L, P, 2) as (x, y), [0, 1] covers the level; the type of value, or float32
            where value is a half type. NaN, infinite and far outside locations sample nothing.
        attention_weights: (B, Q, H, L, P), in a type like sampling_locations.

    Returns:
        (B, Q, H * D) in the type of value. Sums are kept in float32 (float64 for float64) in every backend.

    Raises:
        RuntimeError: shapes, types or devices do not fit together; raised before anything is computed.
    """
    return torch.ops.dn_detr.ms_deform_attn(
        value, _on_host(spatial_shapes), _on_host(level_start_index), sampling_locations, attention_weights
    )


def _on_host(numbers: Tensor | Sequence[Any]) -> Tensor:
    """Return sizes as a tensor; Python integers become a CPU tensor, which costs no synchronisation."""
    if isinstance(numbers, Tensor):
        return numbers
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def check_arguments(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor
) -> None:
    """Check shapes, types and devices; reads no data, so that it serves fake tensors too.

    Raises:
        RuntimeError: what was expected and what came.
    """
    if value.ndim != 4:
        raise _misfit(f"expected value of shape (B, S, H, D), got {tuple(value.shape)}")
    if locations.ndim != 6:
        raise _misfit(f"expected sampling_locations of shape (B, Q, H, L, P, 2), got {tuple(locations.shape)}")
    batch, _, heads, channels = value.shape
    queries, _, levels, points = locations.shape[1:5]
    expected = (batch, queries, heads, levels, points, 2)
    if tuple(locations.shape) != expected:
        raise _misfit(
            f"expected sampling_locations of shape {expected} for value of shape {tuple(value.shape)}, "
            f"got {tuple(locations.shape)}"
        )
    if weights.shape != locations.shape[:-1]:
        raise _misfit(f"expected attention_weights of shape {expected[:-1]}, got {tuple(weights.shape)}")
    if min(heads, channels, levels, points) < 1:
        raise _misfit(f"expected at least one head, channel, level and point, got {(heads, channels, levels, points)}")
    _check_sizes("spatial_shapes", spatial_shapes, (levels, 2), value.device)
    _check_sizes("level_start_index", level_start_index, (levels,), value.device)
    if value.dtype not in VALUE_TYPES:
        raise _misfit(f"expected value of one of {VALUE_TYPES}, got {value.dtype}")
    _check_like_value("sampling_locations", locations, value)
    _check_like_value("attention_weights", weights, value)


def _check_sizes(name: str, sizes: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Check a tensor of level sizes, which may lie on the host or beside value."""
    if tuple(sizes.shape) != shape or sizes.dtype != torch.int64:
        raise _misfit(
            f"expected {name} of shape {shape} and type torch.int64 for {shape[0]} levels, "
            f"got {tuple(sizes.shape)} and {sizes.dtype}"
        )
    if sizes.device.type != "cpu" and sizes.device != device:
        raise _misfit(f"expected {name} on the CPU or on {device}, got {sizes.device}")


def _check_like_value(name: str, tensor: Tensor, value: Tensor) -> None:
    """Check that locations or weights have a type and device that go with value."""
    allowed = (value.dtype, torch.float32) if value.dtype in HALF_TYPES else (value.dtype,)
    if tensor.dtype not in allowed:
        raise _misfit(
            f"expected {name} of type {' or '.join(map(str, allowed))} for {value.dtype} value, got {tensor.dtype}"
        )
    if tensor.device != value.device:
        raise _misfit(f"expected {name} on {value.device} like value, got {tensor.device}")


def _misfit(message: str) -> RuntimeError:
    """Return the error for arguments that do not fit."""
    return RuntimeError(f"ms_deform_attn: {message}")


def _read_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> list[tuple[int, int]]:
    """Return the level shapes as integers, after checking that they describe the tokens of value.

    Raises:
        RuntimeError: a level is empty, the levels do not add up to S, or a start is not where the last level ended.
    """
    shapes = [(height, width) for height, width in spatial_shapes.tolist()]
    starts, total = [], 0
    for height, width in shapes:
        if min(height, width) < 1:
            raise _misfit(f"expected levels of at least one token, got spatial_shapes {shapes}")
        starts.append(total)
        total += height * width
    if total != value.shape[1]:
        raise _misfit(f"expected {total} tokens in value for spatial_shapes {shapes}, got {value.shape[1]}")
    if level_start_index.tolist() != starts:
        raise _misfit(
            f"expected level_start_index {starts} for spatial_shapes {shapes}, got {level_start_index.tolist()}"
        )
    return shapes


def _forward(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Check the arguments and hand them to the backend."""
    check_arguments(value, spatial_shapes, level_start_index, locations, weights)
    shapes = _read_levels(value, spatial_shapes, level_start_index)
    return backend_for(value.device.type).forward(value, shapes, locations, weights)


def _forward_fake(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Check the arguments and return an output without content."""
    check_arguments(value, spatial_shapes, level_start_index, locations, weights)
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments and hand them to the backend."""
    check_arguments(value, spatial_shapes, level_start_index, locations, weights)
    expected = (value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    if tuple(grad_output.shape) != expected or grad_output.dtype != value.dtype:
        raise _misfit(
            f"expected grad_output of shape {expected} and type {value.dtype}, "
            f"got {tuple(grad_output.shape)} and {grad_output.dtype}"
        )
    shapes = _read_levels(value, spatial_shapes, level_start_index)
    return backend_for(value.device.type).backward(grad_output, value, shapes, locations, weights)


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients without content: contiguous, in the shapes and types of their tensors."""
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keep the inputs; the samples are taken again in the backward pass, which is cheaper than storing them."""
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Return one gradient per argument of the operator."""
    value, locations, weights = torch.ops.dn_detr.ms_deform_attn_backward(grad_output, *ctx.saved_tensors)
    return value, None, None, locations, weights


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Raise: the gradients of the operator cannot be differentiated again."""
    raise RuntimeError("ms_deform_attn has no second derivative: call backward without create_graph")


def _autocast(keyset: torch.DispatchKeySet) -> Callable[..., Tensor]:
    """Return the operator under autocast.

    value keeps its type, and with it the output. Locations and weights go to float32 (float64 beside float64): half a
    type's precision is a good part of a token on a large level, and every sum is kept in float32 anyway.
    """

    def kernel(
        value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor
    ) -> Tensor:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.dn_detr.ms_deform_attn(
                value, spatial_shapes, level_start_index, locations.to(dtype), weights.to(dtype)
            )

    return kernel


def _register() -> torch.library.Library:
    """Register schemas and kernels; the returned handle keeps them alive."""
    library = torch.library.Library("dn_detr", "DEF")
    library.define(f"ms_deform_attn({ARGUMENTS}) -> Tensor")
    library.define(f"ms_deform_attn_backward(Tensor grad_output, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
    library.impl("ms_deform_attn", _forward, "CompositeExplicitAutograd")
    library.impl("ms_deform_attn_backward", _backward, "CompositeExplicitAutograd")
    name = "dn_detr::ms_deform_attn"
    torch.library.register_fake(name, _forward_fake, lib=library)
    torch.library.register_fake(f"{name}_backward", _backward_fake, lib=library)
    torch.library.register_autograd(name, _autograd_backward, setup_context=_save_for_backward, lib=library)
    torch.library.register_autograd(f"{name}_backward", _refuse_second_derivative, lib=library)
    for key in (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA):
        library.impl("ms_deform_attn", _autocast(torch._C.DispatchKeySet(key)), str(key).rsplit(".", 1)[-1])
    return library


# A schema is a declaration like a class: it has to exist before anything can be traced or compiled.
_LIBRARY = _register()
