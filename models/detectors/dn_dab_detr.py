"""DN-DAB-DETR: DAB-DETR with denoising training (DN-DETR, CVPR 2022); without `--use_dn` by matching alone."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch import nn

from ..registry import register_model
from .dab_detr import build_dab_detr


@register_model("dn_dab_detr")
def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build DN-DAB-DETR from options."""
    return build_dab_detr(args, label_embedding=True)
