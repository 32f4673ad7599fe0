"""What all detectors do with their heads: initialise them and lay out the outputs."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .mlp import MLP

PRIOR_PROBABILITY = 0.01


def build_class_head(d_model: int, num_classes: int) -> nn.Linear:
    """Return a linear head whose classes all start at probability 0.01 (focal loss, ICCV 2017, "Initialization")."""
    head = nn.Linear(d_model, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return head


def build_box_head(d_model: int) -> MLP:
    """Return a box head that starts without any offset from the anchors."""
    head = MLP(d_model, d_model, 4, 3)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return head


def detection_outputs(logits: Tensor, boxes_cxcywh: Tensor, *, aux_loss: bool) -> dict[str, Any]:
    """Lay out predictions of all layers.

    Args:
        logits: (N, B, Q, K); boxes_cxcywh: (N, B, Q, 4) in [0, 1]; last layer last.
        aux_loss: report earlier layers too.

    Returns:
        `pred_logits` (B, Q, K), `pred_boxes` (B, Q, 4) and, with aux_loss, `aux_outputs`: the same per earlier layer.
    """
    # One unbind, whose gradient is one stack; an index per layer would give a tensor of zeros per layer.
    layers: list[dict[str, Any]] = [
        {"pred_logits": a, "pred_boxes": b} for a, b in zip(logits.unbind(), boxes_cxcywh.unbind(), strict=True)
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]} if aux_loss else layers[-1]
