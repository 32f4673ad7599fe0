"""The DINO-style DN-DAB-Deformable-DETR: look forward twice, mixed query selection, contrastive denoising.

The parts come from DINO (ICLR 2023), in the form DN-DETR's repository gives them. Each is an option here: `--use_lft`,
`--use_mqs` (with `--two_stage`), `--contrastive`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch import nn

from .. import build
from ..registry import register_model
from .dab_deformable_detr import build_dab_deformable_detr

LEAST_BUDGET = 100  # from here on --scalar counts denoising queries instead of groups


@register_model("dn_dab_dino_deformable_detr")
def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build the DINO-style detector from options.

    Differs from official: `--use_mqs` and `--use_lft` are read. The official code never reads them and does both.
    """
    budget = args.dn_number or (args.scalar if args.scalar >= LEAST_BUDGET else 0)
    return build_dab_deformable_detr(
        args,
        label_embedding=True,
        denoising=build.denoising_from_args(args, box_noise="corner", budget=budget),
        look_forward_twice=args.use_lft,
        mixed_query_selection=args.two_stage and args.use_mqs,
        num_results=args.num_results,
    )
