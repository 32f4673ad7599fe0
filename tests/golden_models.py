"""Small reference models: build ours with the same options and weights, replay the recorded noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import main
from models import build_model
from tests.golden_recipe import load_meta, load_npz, load_recipe_weights, target

SMALL_MODELS = (
    "dn_dab_detr_r18",
    "dn_dab_detr_r50_dc5_3pat",
    "dab_detr_r18",
    "dab_detr_r50_dc5_3pat",
    "dn_dab_deformable_detr_r50",
    "dab_deformable_detr_r50",
    "dab_deformable_detr_r50_3pat",
    "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat",
    "dn_dab_dino_deformable_detr_r50_one_stage",
    "dn_dab_dino_deformable_detr_r50_one_stage_contrastive",
    "dn_dab_dino_deformable_detr_r50_two_stage",
    "dn_dab_dino_deformable_detr_r50_two_stage_contrastive",
    "deformable_detr_r50",
    "deformable_detr_r50_iterative_bbox_refinement",
    "deformable_detr_r50_single_scale",
    "deformable_detr_r50_single_scale_dc5",
    "deformable_detr_r50_two_stage",
)


def reference_args(meta: dict[str, Any], *extra: str) -> Any:
    """Return the options a reference was computed with, on random backbone weights."""
    arguments = list(meta["arguments"])
    if "-m" not in arguments:
        arguments = ["-m", "deformable_detr", *arguments]
    return main.parse_args([*arguments, "--backbone_weights", "none", "--device", "cpu", *extra])


def load_reference(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any], nn.Module, Any, Any]:
    """Return arrays, meta, our model with the reference weights, its criterion and postprocessors."""
    arrays = load_npz(f"small/{name}.npz")
    meta = load_meta(arrays)
    model, criterion, postprocessors = build_model(reference_args(meta))
    load_recipe_weights(model, meta["salt"], meta["shared_heads"])
    return arrays, meta, model, criterion, postprocessors


def case_targets(meta: dict[str, Any], case: str) -> list[dict[str, Tensor]]:
    """Return the targets of one case."""
    targets = []
    for tag, count in zip(meta["cases"][case]["target_tags"], meta["cases"][case]["counts"], strict=True):
        boxes, labels = target(tag, count, meta["salt"])
        targets.append({"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)})
    return targets


def recorded_noise(arrays: dict[str, np.ndarray], prefix: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Return a stand-in for `add_noise` that applies recorded random numbers by the laws in closed form.

    Args:
        arrays: reference arrays; prefix: where the draws lie in them.
        options: `label_noise_scale`, `box_noise_scale`, `contrastive` and `corner` of the reference.
    """
    draws = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix + "draw")}
    draw = [draws[name] for name in sorted(draws)]

    def add_noise(labels: Tensor, boxes: Tensor, num_classes: int, **_: Any) -> tuple[Tensor, Tensor]:
        labels, left = labels.clone(), list(draw)
        negative = labels == num_classes
        if options["label_noise_scale"] > 0:
            # The recorded flip probability is half the number that is compared in the official code.
            chosen = (left.pop(0) < options["label_noise_scale"]).nonzero().flatten()
            labels[chosen] = left.pop(0)
            labels[negative] = num_classes
        if options["box_noise_scale"] <= 0:
            return labels, boxes
        scale, size = options["box_noise_scale"], boxes[:, 2:]
        if not options["corner"]:
            reach = torch.cat((size / 2, size), 1) * scale
            return labels, (boxes + (left.pop(0) * 2 - 1) * reach).clamp(0, 1)
        if options["contrastive"]:
            sign, magnitude = left.pop(0).float() * 2 - 1, left.pop(0)
            shift = sign * torch.where(negative[:, None], magnitude + 1, magnitude)
        else:
            shift = left.pop(0) * 2 - 1
        corners = torch.cat((boxes[:, :2] - size / 2, boxes[:, :2] + size / 2), 1)
        corners = (corners + shift * torch.cat((size, size), 1) / 2 * scale).clamp(0, 1)
        return labels, torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1)

    return add_noise
