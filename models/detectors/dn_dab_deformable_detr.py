"""DN-DAB-Deformable-DETR: DAB-Deformable-DETR with denoising training (DN-DETR, CVPR 2022)."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch import nn

from .. import build
from ..registry import register_model
from .dab_deformable_detr import build_dab_deformable_detr


@register_model("dn_dab_deformable_detr", "dn_deformable_detr")
def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build DN-DAB-Deformable-DETR from options; without `--use_dn` it trains by matching alone."""
    return build_dab_deformable_detr(args, label_embedding=True, denoising=build.denoising_from_args(args))
