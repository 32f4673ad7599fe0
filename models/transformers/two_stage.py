"""Two-stage proposals: the encoder's best tokens become queries (Deformable DETR, ICLR 2021, "Two-Stage")."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers.anchor_encoding import anchor_sine_embedding
from .deformable_encoder import TokenLevels, token_centres

FINEST_SIZE = 0.05  # width and height of a proposal on the finest level, relative to the image; doubled level by level
OBJECT_CLASS = 0  # the first stage only asks whether there is an object: class 0 of the logits ranks the tokens
BORDER = 0.01  # proposals whose centre or size is closer than this to 0 or 1 are not used


class Proposals(NamedTuple):
    """What the first stage hands to the decoder and to the criterion.

    Attributes:
        logits: (B, S, K) and boxes_cxcywh: (B, S, 4) in [0, 1], one per token, for the proposal losses.
        anchors_unsigmoid: (B, Q, 4) best boxes before the sigmoid, detached; inf where a token was unusable.
        content: (B, Q, C) and position: (B, Q, C) or None, of the queries that start from them.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    anchors_unsigmoid: Tensor
    content: Tensor
    position: Tensor | None

    def outputs(self) -> dict[str, Any]:
        """Return what the criterion needs, as a detector's `enc_outputs`."""
        return {"pred_logits": self.logits, "pred_boxes": self.boxes_cxcywh, "class_agnostic": True}


def base_proposals(memory: TokenLevels) -> tuple[Tensor, Tensor]:
    """Place one box on every token, larger on coarser levels.

    Returns:
        boxes before the sigmoid (B, S, 4) cxcywh, float32, inf where unusable; and which are unusable (B, S) bool:
        those on padding or too close to the border.
    """
    boxes = []
    for level, (shape, ratio) in enumerate(zip(memory.shapes, memory.valid_ratios.unbind(1), strict=True)):
        centres = token_centres(shape, ratio)
        boxes.append(torch.cat((centres, torch.full_like(centres, FINEST_SIZE * 2**level)), dim=-1))
    boxes_cxcywh = torch.cat(boxes, dim=1)
    inside = ((boxes_cxcywh > BORDER) & (boxes_cxcywh < 1 - BORDER)).all(-1)
    unusable = ~inside if memory.padding_mask is None else memory.padding_mask | ~inside
    boxes_unsigmoid = torch.log(boxes_cxcywh / (1 - boxes_cxcywh))
    return boxes_unsigmoid.masked_fill(unusable[..., None], float("inf")), unusable


def best_tokens(scores: Tensor, num_queries: int) -> Tensor:
    """Return the (B, min(num_queries, S)) indices of the highest of (B, S) scores, best first."""
    return scores.topk(min(num_queries, scores.shape[1]), dim=1).indices


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick (B, Q, C) of (B, S, C) by index (B, Q)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def proposal_embedding(anchors_unsigmoid: Tensor, num_feats: int) -> Tensor:
    """Embed boxes before the sigmoid, (..., 4) -> (..., 4 * num_feats), in the order x, y, w, h."""
    y, x, size = anchor_sine_embedding(anchors_unsigmoid.sigmoid(), num_feats).tensor_split(
        (num_feats, 2 * num_feats), -1
    )
    return torch.cat((x, y, size), dim=-1)
