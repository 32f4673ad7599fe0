"""Weights, images and targets made from names alone, and the reference files that were computed with them.

The reference numbers belong to models whose every parameter is drawn from a generator seeded with the parameter's
own name, so that no weight file has to be stored. This module repeats that recipe.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

TESTS_DIR = Path(__file__).resolve().parent

EMBEDDINGS = (
    "label_enc.weight",
    "tgt_embed.weight",
    "query_embed.weight",
    "patterns.weight",
    "patterns_embed.weight",
    "level_embed",
    "refpoint_embed.weight",
    "row_embed.weight",
    "col_embed.weight",
)

# Factor on 1/sqrt(fan-in), chosen by the first pattern that matches; every other matrix has factor 1.
GAINS = (
    (r"bbox_embed\.(\d+\.)?layers\.2\.weight$", 0.5),
    (r"\.ca_(qpos_sine|kpos)_proj\.weight$", 4.0),
    (r"\.(sa|ca)_\w+_proj\.weight$", 2.0),
    (r"in_proj_weight$", 2.0),
    (r"cross_attn\.out_proj\.weight$", 3.0),
    (r"self_attn\.out_proj\.weight$", 0.2),
    (r"linear2\.weight$", 0.4),
)


def rs_for(name: str, salt: str = "") -> np.random.RandomState:
    """Return the generator that belongs to a name."""
    return np.random.RandomState(zlib.crc32((salt + name).encode()) & 0x7FFFFFFF)


def canonical(name: str, shared_heads: bool = False) -> str:
    """Return the name under which a parameter that is registered several times is drawn.

    Args:
        name: state-dict name.
        shared_heads: one box head and one class head serve all decoder layers.
    """
    for head in ("bbox_embed.", "class_embed."):
        if name.startswith("transformer.decoder." + head):
            name = name.removeprefix("transformer.decoder.")
    if shared_heads:
        name = re.sub(r"^(bbox_embed|class_embed)\.\d+\.", r"\1.0.", name)
    return name


def weight(name: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """Draw one parameter or buffer, float32.

    Args:
        name: canonical state-dict name.
        shape: its shape.
        salt: put before the name when seeding.
    """
    z = rs_for(name, salt).standard_normal(tuple(shape))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        value = 0.75 + 0.25 * np.abs(z)
    elif leaf == "running_mean":
        value = 0.1 * z
    elif name.endswith("activation.weight"):
        value = 0.25 + 0.05 * z
    elif name.endswith(EMBEDDINGS) or name.endswith("sampling_offsets.bias"):
        value = 1.0 * z
    elif leaf in ("weight", "in_proj_weight") and len(shape) >= 2:
        gain = next((factor for pattern, factor in GAINS if re.search(pattern, name)), 1.0)
        value = gain / np.sqrt(int(np.prod(shape[1:]))) * z
    elif leaf == "weight":
        value = 1.0 + 0.1 * z
    elif re.search(r"class_embed\.(\d+\.)?bias$", name):
        value = -2.0 + 0.1 * z
    else:
        value = 0.1 * z
    return value.astype(np.float32)


def image(tag: str, height: int, width: int, salt: str = "") -> np.ndarray:
    """Draw a (3, height, width) float32 image of coarse and fine noise that needs no normalisation."""
    rs = rs_for("image:" + tag, salt)
    fine = rs.standard_normal((3, height, width))
    coarse = rs.standard_normal((3, -(-height // 16), -(-width // 16)))
    coarse = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return (0.5 * fine + 1.5 * coarse).astype(np.float32)


def target(tag: str, n: int, salt: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Draw n objects: (n, 4) float32 cxcywh boxes inside the unit square and (n,) int64 labels from 1 to 90."""
    rs = rs_for("target:" + tag, salt)
    u = rs.uniform(size=(n, 4))
    wh = 0.1 + 0.4 * u[:, 2:]
    boxes_cxcywh = np.concatenate([wh / 2 + (1 - wh) * u[:, :2], wh], axis=1).astype(np.float32)
    return boxes_cxcywh, rs.randint(1, 91, size=(n,)).astype(np.int64)


def images_of(meta: dict[str, Any]) -> list[Tensor]:
    """Return the (3, H, W) images that a reference file was computed on."""
    return [
        torch.from_numpy(image(tag, height, width, meta["salt"]))
        for tag, (height, width) in zip(meta["image_tags"], meta["image_hw"], strict=True)
    ]


@torch.no_grad()
def load_recipe_weights(model: nn.Module, salt: str = "", shared_heads: bool = False, prefix: str = "") -> None:
    """Overwrite every floating-point parameter and buffer of a model with its recipe values, in place.

    Args:
        model: module whose state-dict names count.
        salt: as in the reference file's ``meta``.
        shared_heads: as in the reference file's ``meta``.
        prefix: put before every name, for a part of a model, such as ``"backbone."``.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            drawn = weight(canonical(prefix + name, shared_heads), tuple(tensor.shape), salt)
            tensor.copy_(torch.from_numpy(drawn))


def golden_dir(relative_name: str = "") -> Path:
    """Return the folder that holds a reference file: the one inside the tests when it has it, else the shared one.

    Args:
        relative_name: file or folder below it, such as ``"small/dn_dab_detr_r18.npz"``.
    """
    own = TESTS_DIR / "golden"
    return own if (own / relative_name).exists() else TESTS_DIR.parent.parent / "shared" / "golden"


def golden_file(relative_name: str) -> Path:
    """Return the path of a reference file; the calling test is skipped where neither folder has it."""
    path = golden_dir(relative_name) / relative_name
    if not path.exists():
        pytest.skip(f"reference file {relative_name} is not here")
    return path


def load_npz(relative_name: str) -> dict[str, np.ndarray]:
    """Read every array of a reference ``.npz``; the calling test is skipped where the file is absent."""
    with np.load(golden_file(relative_name), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def load_meta(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the description stored in the entry ``meta`` of a reference file."""
    return json.loads(str(arrays["meta"]))


def load_json(relative_name: str) -> Any:
    """Read a reference ``.json``; the calling test is skipped where the file is absent."""
    return json.loads(golden_file(relative_name).read_text(encoding="utf-8"))


def assert_probe(arrays: dict[str, np.ndarray], name: str, actual: Tensor, rtol: float, atol: float) -> None:
    """Compare a tensor with the 64 values and the shape stored for it.

    Args:
        arrays: what ``load_npz`` returned.
        name: full name of the probe, such as ``"eval/probe/memory"``.
        actual: tensor to check, any shape.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    assert tuple(actual.shape) == tuple(int(size) for size in arrays[f"{name}/shape"]), name
    flat = actual.detach().reshape(-1).double().cpu().numpy()
    picked = flat[np.linspace(0, flat.size - 1, 64).astype(np.int64)]
    np.testing.assert_allclose(picked, arrays[f"{name}/at64"], rtol=rtol, atol=atol, err_msg=name)
