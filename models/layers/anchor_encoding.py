"""Anchors: learned boxes as queries, and the sine embedding that makes them the positional part of attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from util.box_ops import inverse_sigmoid


def anchor_sine_embedding(anchors_cxcywh: Tensor, num_feats: int = 128) -> Tensor:
    """Embed anchors with sines and cosines (DAB-DETR, ICLR 2022, "Anchor boxes as queries"), temperature 10000.

    Args:
        anchors_cxcywh: (..., 4) boxes or (..., 2) centres in [0, 1].
        num_feats: numbers per coordinate, d_model / 2 in the models.

    Returns:
        (..., 4 * num_feats) in the order y, x, w, h, or (..., 2 * num_feats) in the order y, x; float32 at least.
    """
    anchors = anchors_cxcywh if anchors_cxcywh.dtype == torch.float64 else anchors_cxcywh.float()
    # A sine and a cosine share each wavelength.
    exponent = torch.arange(0, num_feats, 2, dtype=anchors.dtype, device=anchors.device) / num_feats
    angle = (anchors * (2 * math.pi))[..., None] / 10000**exponent
    waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
    x_first = waves.unbind(dim=-2)
    return torch.cat((x_first[1], x_first[0], *x_first[2:]), dim=-1)


def build_anchors(num_queries: int, *, random_xy: bool) -> nn.Embedding:
    """Return learned anchors (Q, 4) cxcywh before the sigmoid.

    Args:
        num_queries: Q.
        random_xy: spread the centres evenly over the image instead of around its middle. They train all the same:
            the official code means to freeze them and does not.
    """
    anchors = nn.Embedding(num_queries, 4)
    if random_xy:
        with torch.no_grad():
            centres = anchors.weight[:, :2].uniform_(0, 1)
            anchors.weight[:, :2] = inverse_sigmoid(centres)
    return anchors
