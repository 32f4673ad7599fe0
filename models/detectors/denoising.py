"""What detectors with anchors do around their decoder: matching queries, denoising ones before them, answers apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dn_components import DenoisingMeta, DenoisingOptions, Targets, dn_post_process, prepare_for_dn
from ..layers.prediction_heads import detection_outputs


class DecoderQueries(NamedTuple):
    """What the decoder is asked; the denoising part, where there is one, comes first.

    Attributes:
        content: (B, Q, C); anchors_unsigmoid: (B, Q, 4) cxcywh before the sigmoid.
        attn_mask: (Q, Q) or (B, Q, Q), True = may not attend; None without a denoising part.
        meta: of the denoising part, None without one.
    """

    content: Tensor
    anchors_unsigmoid: Tensor
    attn_mask: Tensor | None = None
    meta: DenoisingMeta | None = None


def matching_part(content: Tensor, anchors: Tensor, patterns: nn.Embedding | None, batch_size: int) -> DecoderQueries:
    """Ask for every image every anchor, or every anchor once per pattern (Anchor DETR, AAAI 2022).

    Args:
        content: (Q, C); anchors: (Q, 4) cxcywh before the sigmoid.
        patterns: embeddings that are added to the content; queries of one pattern stand together.
        batch_size: B.
    """
    if patterns is not None:
        content = (patterns.weight[:, None] + content).flatten(0, 1)
        anchors = anchors.repeat(patterns.num_embeddings, 1)
    return DecoderQueries(content.expand(batch_size, -1, -1), anchors.expand(batch_size, -1, -1))


def prepend_denoising(
    matching: DecoderQueries, targets: Targets | None, label_enc: nn.Embedding, options: DenoisingOptions
) -> DecoderQueries:
    """Put the denoising part of a training batch before the matching part.

    Raises:
        ValueError: there are no targets.
    """
    if targets is None:
        raise ValueError("training with denoising needs the ground truth: call model(samples, targets)")
    dn = prepare_for_dn(targets, label_enc, num_matching=matching.content.shape[1], options=options)
    return DecoderQueries(
        content=torch.cat((dn.content, matching.content), dim=1),
        anchors_unsigmoid=torch.cat((dn.boxes_unsigmoid, matching.anchors_unsigmoid), dim=1),
        attn_mask=dn.attn_mask,
        meta=dn.meta,
    )


def split_outputs(
    logits: Tensor, boxes_cxcywh: Tensor, meta: DenoisingMeta | None, *, aux_loss: bool
) -> dict[str, Any]:
    """Lay out predictions of all layers, (N, B, Q, K) and (N, B, Q, 4), with `dn_meta` if there is a denoising part."""
    if meta is None:
        return detection_outputs(logits, boxes_cxcywh, aux_loss=aux_loss)
    logits, boxes_cxcywh, denoised = dn_post_process(logits, boxes_cxcywh, meta)
    return detection_outputs(logits, boxes_cxcywh, aux_loss=aux_loss) | {"dn_meta": denoised}
