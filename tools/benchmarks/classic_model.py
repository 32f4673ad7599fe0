"""The layers of a detector as classic code computes them, put in the place of ours for a measurement."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

from models.ops import reference
from models.transformers.deformable_decoder import Decoded, DeformableDecoder, refine_references


def plain_operator(
    value: Tensor, spatial_shapes: Any, level_start_index: Any, locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample in plain PyTorch, differentiated by autograd."""
    return reference.forward(value, [(int(h), int(w)) for h, w in spatial_shapes], locations, weights)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, may_attend: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute attention with all its weights written down; arguments and result as of `attend`.

    Raises:
        ValueError: there is dropout.
    """
    if dropout:
        raise ValueError(f"expected no dropout in a measurement, got {dropout}")
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if may_attend is not None:
        logits = logits.masked_fill(~may_attend, float("-inf"))
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def classic_arithmetic() -> Iterator[None]:
    """Let layers compute as classic code does inside the block.

    The operator is plain PyTorch, frozen batch norms multiply and shift the feature maps, and feed-forward blocks take
    all tokens at once.
    """
    with (
        mock.patch("models.layers.ms_deform_attn.ms_deform_attn", plain_operator),
        mock.patch("models.backbones.resnet.frozen_affines", lambda pairs: {}),
        mock.patch("models.layers.feed_forward.CHUNK", sys.maxsize),
    ):
        yield


@contextlib.contextmanager
def classic_launches() -> Iterator[None]:
    """Let layers launch inside the block what classic code launches beside `classic_arithmetic`.

    Attention writes its weights down, and deformable decoders run each box head twice: to refine and to predict.
    """
    decode = DeformableDecoder.forward

    def decode_twice(
        self: DeformableDecoder, queries: Tensor, references: Tensor, memory: Any, box_heads: Any, **options: Any
    ) -> Decoded:
        decoded = decode(self, queries, references, memory, box_heads, **options)
        found = zip(box_heads, decoded.hidden_states, decoded.references, strict=False)
        return decoded._replace(
            boxes=[refine_references(head(hidden), start, self.eps) for head, hidden, start in found]
        )

    with (
        mock.patch("models.layers.attention.attend", explicit_attention),
        mock.patch("models.transformers.multi_scale_dab.attend", explicit_attention),
        mock.patch.object(DeformableDecoder, "forward", decode_twice),
    ):
        yield
