"""Look into a detector while it computes: anchors of every layer, cross-attention, the denoising part.

Everything is read from outside, by hooks and by replacing a function for one call; the models know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import dn_components
from models.layers import ms_deform_attn
from models.layers.ms_deform_attn import MSDeformAttn
from models.transformers import multi_scale_dab
from models.transformers.multi_scale_dab import MultiScaleDabDecoderLayer


class LayerTrace(NamedTuple):
    """What the decoder starts from and predicts for one image, layer by layer.

    Attributes:
        references: N of (Q, 4) anchors cxcywh or (Q, 2) points (x, y), where each layer started, in [0, 1].
        boxes: (N, Q, 4) boxes cxcywh in [0, 1] and probabilities: (N, Q, K), as predicted after each layer.
    """

    references: list[Tensor]
    boxes: Tensor
    probabilities: Tensor


class DenseAttention(NamedTuple):
    """Cross-attention of one layer to whole feature maps.

    Attributes:
        maps: per level (H, Q, h, w); of every head and query all levels together add up to 1.
    """

    maps: list[Tensor]


class SampledAttention(NamedTuple):
    """Cross-attention of one layer to sampled points.

    Attributes:
        locations: (Q, H, L, P, 2) as (x, y), [0, 1] covers the picture; weights: (Q, H, L, P), of every query and head
            they add up to 1.
    """

    locations: Tensor
    weights: Tensor


class DenoisingTrace(NamedTuple):
    """The denoising part of one image: T queries, group after group.

    Attributes:
        group: (T,) group and known: (T,) known object of every query; negative: (T,) bool, of contrastive pairs.
        noised_labels: (T,) classes fed in, K for negatives; noised_boxes: (T, 4) anchors cxcywh fed in.
        boxes: (T, 4) cxcywh and probabilities: (T, K), predicted by the last layer.
    """

    group: Tensor
    known: Tensor
    negative: Tensor
    noised_labels: Tensor
    noised_boxes: Tensor
    boxes: Tensor
    probabilities: Tensor


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def recorded_calls(owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Record the arguments and, last, the result of every call of a function of a module."""
    function: Callable[..., Any] = getattr(owner, name)
    calls: list[tuple[Any, ...]] = []

    def recording(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        calls.append((*args, options, result))
        return result

    with replaced(owner, name, recording):
        yield calls


@contextmanager
def recorded_modules(*modules: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Record the positional inputs and, last, the output of every forward pass of modules, in the order of calls."""
    calls: list[tuple[Any, ...]] = []
    handles = [m.register_forward_hook(lambda _, inputs, output: calls.append((*inputs, output))) for m in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace_layers(model: nn.Module, image: Tensor) -> LayerTrace:
    """Run one image (3, H, W) and return what every decoder layer started from and predicted."""
    decoder = _decoder(model)
    # A model trained without auxiliary losses keeps its earlier predictions to itself.
    with replaced(model, "aux_loss", True), recorded_modules(decoder) as calls:
        outputs = model([image])
    layers = [*outputs["aux_outputs"], outputs]
    return LayerTrace(
        references=[reference[0].float().cpu() for reference in calls[0][-1][1]],
        boxes=torch.stack([layer["pred_boxes"][0] for layer in layers]).float().cpu(),
        probabilities=torch.stack([layer["pred_logits"][0] for layer in layers]).float().sigmoid().cpu(),
    )


@torch.no_grad()
def trace_cross_attention(model: nn.Module, image: Tensor) -> Sequence[DenseAttention | SampledAttention]:
    """Run one image (3, H, W) and return the cross-attention of every decoder layer."""
    layers: Any = _decoder(model).layers
    if isinstance(layers[0], MultiScaleDabDecoderLayer):
        return _trace_level_attention(model, image, layers)
    if isinstance(layers[0].cross_attn, MSDeformAttn):
        return _trace_sampled_attention(model, image, layers)
    return _trace_dense_attention(model, image, layers)


def dense_weights(query: Tensor, key: Tensor, *, num_heads: int, may_attend: Tensor | None) -> Tensor:
    """Compute the softmax weights that `models.layers.attention.attend` mixes values with.

    Args:
        query: (B, Q, H * Dk); key: (B, S, H * Dk); may_attend: True = may attend, broadcasts to (B, H, Q, S).

    Returns:
        (B, H, Q, S), adding up to 1 over S.
    """
    query, key = (x.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key))
    products = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if may_attend is not None:
        products = products.masked_fill(~may_attend, float("-inf"))
    return products.softmax(-1)


@torch.no_grad()
def trace_denoising(model: nn.Module, image: Tensor, target: dict[str, Tensor], *, seed: int) -> DenoisingTrace:
    """Run one image with noised known objects and return what went in and came out.

    Dropout and batch norms stay as in evaluation.

    Args:
        model: a detector with denoising; image: (3, H, W).
        target: `labels` (n,) and `boxes` (n, 4) cxcywh in [0, 1].
        seed: of the noise.
    """
    decoder = _decoder(model)
    # The flag of the detector alone decides about the denoising part; its layers have flags of their own.
    with (
        torch.random.fork_rng(devices=[]),
        replaced(model, "training", True),
        recorded_modules(decoder) as decoded,
        recorded_calls(dn_components, "add_noise") as noised,
    ):
        torch.manual_seed(seed)
        denoised = model([image], [target])["dn_meta"]
    meta = denoised.meta
    group_size = meta.pad_size // meta.num_groups
    place = meta.slot_index % group_size
    negative = meta.labels == denoised.logits.shape[-1]
    anchors = decoded[0][-1][1][0][0, meta.slot_index]
    parts = (
        meta.slot_index // group_size,
        torch.where(negative, place - len(target["labels"]), place),
        negative,
        noised[0][-1][0],
        anchors.float(),
        denoised.boxes_cxcywh[-1, 0, meta.slot_index].float(),
        denoised.logits[-1, 0, meta.slot_index].float().sigmoid(),
    )
    return DenoisingTrace(*(part.cpu() for part in parts))


def _decoder(model: nn.Module) -> nn.Module:
    transformer: Any = model.transformer
    return transformer.decoder


def _trace_dense_attention(model: nn.Module, image: Tensor, layers: Any) -> list[DenseAttention]:
    transformer: Any = model.transformer
    with recorded_modules(*(layer.cross_attn for layer in layers)) as calls, recorded_modules(transformer) as inputs:
        model([image])
    shape = inputs[0][0].shape[-2:]
    traces = []
    for layer, (query, key, _, may_attend, _) in zip(layers, calls, strict=True):
        weights = dense_weights(query, key, num_heads=layer.cross_attn.num_heads, may_attend=may_attend)
        traces.append(DenseAttention([weights[0].unflatten(-1, shape).cpu()]))
    return traces


def _trace_level_attention(model: nn.Module, image: Tensor, layers: Any) -> list[DenseAttention]:
    transformer: Any = model.transformer
    with (
        recorded_calls(multi_scale_dab, "attend") as calls,
        recorded_modules(*(layer.lvl_attn for layer in layers)) as level_logits,
        recorded_modules(transformer.encoder) as encoded,
    ):
        model([image])
    shapes = encoded[0][-1].shapes
    traces = []
    for number, (_, logits) in enumerate(level_logits):
        shares = logits[0].float().softmax(-1).unbind(-1)
        maps = []
        own_calls = calls[number * len(shapes) : (number + 1) * len(shapes)]
        for (query, key, _, options, _), share, shape in zip(own_calls, shares, shapes, strict=True):
            weights = dense_weights(query, key, num_heads=options["num_heads"], may_attend=options["may_attend"])
            maps.append((weights[0] * share[:, None]).unflatten(-1, shape).cpu())
        traces.append(DenseAttention(maps))
    return traces


def _trace_sampled_attention(model: nn.Module, image: Tensor, layers: Any) -> list[SampledAttention]:
    with recorded_calls(ms_deform_attn, "ms_deform_attn") as calls:
        model([image])
    # The encoder's layers call the operator first.
    return [
        SampledAttention(locations[0].float().cpu(), weights[0].float().cpu())
        for _, _, _, locations, weights, _, _ in calls[-len(layers) :]
    ]
