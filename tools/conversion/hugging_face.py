"""Names and options of Hugging Face transformers' DAB-DETR, Deformable DETR and Conditional DETR.

Both spellings are known: that of the files, which is that of transformers 4 as well, and that of a transformers 5 model
in memory (`mlp.fc1`, `o_proj`, `backbone.model`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from util.errors import CheckpointError

# model_type of config.json -> our model. Conditional DETR is no model of ours: its weights start a DAB-DETR.
MODEL_NAMES = {"dab-detr": "dab_detr", "deformable_detr": "deformable_detr", "conditional_detr": "dab_detr"}

# Our option -> entry of config.json.
OPTIONS = {
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "dim_feedforward": "encoder_ffn_dim",
    "nheads": "encoder_attention_heads",
    "num_queries": "num_queries",
    "transformer_activation": "activation_function",
}
OWN_OPTIONS = {
    "dab-detr": {
        "num_patterns": "num_patterns",
        "pre_norm": "normalize_before",
        "pe_temperatureH": "temperature_height",
        "pe_temperatureW": "temperature_width",
    },
    "deformable_detr": {
        "position_embedding": "position_embedding_type",
        "num_feature_levels": "num_feature_levels",
        "enc_n_points": "encoder_n_points",
        "dec_n_points": "decoder_n_points",
        "with_box_refine": "with_box_refine",
        "two_stage": "two_stage",
    },
}
# Settings that may differ between encoder and decoder there, and are one option here.
TWINS = ("ffn_dim", "attention_heads")

Rules = tuple[tuple[str, str], ...]

_BACKBONE: Rules = (
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?", "backbone.0.body."),
    # Hugging Face's own ResNet; timm's has torchvision's names already.
    (r"body\.embedder\.embedder\.convolution\.", "body.conv1."),
    (r"body\.embedder\.embedder\.normalization\.", "body.bn1."),
    (r"body\.encoder\.stages\.0\.", "body.layer1."),
    (r"body\.encoder\.stages\.1\.", "body.layer2."),
    (r"body\.encoder\.stages\.2\.", "body.layer3."),
    (r"body\.encoder\.stages\.3\.", "body.layer4."),
    (r"(body\.layer\d\.)layers\.", r"\1"),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
    (r"layer\.0\.convolution\.", "conv1."),
    (r"layer\.1\.convolution\.", "conv2."),
    (r"layer\.2\.convolution\.", "conv3."),
    (r"layer\.0\.normalization\.", "bn1."),
    (r"layer\.1\.normalization\.", "bn2."),
    (r"layer\.2\.normalization\.", "bn3."),
)
_ENCODER: Rules = (
    (r"(encoder\.layers\.\d+\.)self_attn_layer_norm\.", r"\1norm1."),
    (r"(encoder\.layers\.\d+\.)final_layer_norm\.", r"\1norm2."),
    (r"(encoder\.layers\.\d+\.)activation_fn\.", r"\1activation."),
)
_SHARED: Rules = (
    (r"\.(?:mlp\.)?fc1\.", ".linear1."),
    (r"\.(?:mlp\.)?fc2\.", ".linear2."),
    (r"\.o_proj\.", ".out_proj."),
    (r"^model\.position_embedding\.row_embeddings\.", "backbone.1.row_embed."),
    (r"^model\.position_embedding\.column_embeddings\.", "backbone.1.col_embed."),
    (r"^model\.input_projection\.", "input_proj."),
    (r"^model\.input_proj\.", "input_proj."),
)
_DAB_DECODER: Rules = (
    (r"self_attn\.self_attn_layer_norm\.", "norm1."),
    (r"cross_attn\.cross_attn_layer_norm\.", "norm2."),
    (r"(decoder\.layers\.\d+\.)mlp\.final_layer_norm\.", r"\1norm3."),
    (r"(decoder\.layers\.\d+\.)mlp\.activation_fn\.", r"\1activation."),
    (r"self_attn\.self_attn_query_(content|pos)_proj", r"sa_q\1_proj"),
    (r"self_attn\.self_attn_key_(content|pos)_proj", r"sa_k\1_proj"),
    (r"self_attn\.self_attn_value_proj", "sa_v_proj"),
    (r"cross_attn\.cross_attn_query_(content|pos|pos_sine)_proj", r"ca_q\1_proj"),
    (r"cross_attn\.cross_attn_key_(content|pos)_proj", r"ca_k\1_proj"),
    (r"cross_attn\.cross_attn_value_proj", "ca_v_proj"),
    (r"self_attn\.self_attn\.output_proj", "self_attn.out_proj"),
    (r"cross_attn\.cross_attn\.output_proj", "cross_attn.out_proj"),
    (r"decoder\.layernorm\.", "decoder.norm."),
    (r"^model\.query_refpoint_embeddings\.", "refpoint_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
)
_CONDITIONAL_DECODER: Rules = (
    (r"(decoder\.layers\.\d+\.)self_attn_layer_norm\.", r"\1norm1."),
    (r"(decoder\.layers\.\d+\.)encoder_attn_layer_norm\.", r"\1norm2."),
    (r"(decoder\.layers\.\d+\.)final_layer_norm\.", r"\1norm3."),
    (r"self_attn\.([qk])_(content|pos)_proj", r"sa_\1\2_proj"),
    (r"(decoder\.layers\.\d+\.)self_attn\.v_proj", r"\1sa_v_proj"),
    (r"encoder_attn\.([qk])_(content|pos|pos_sine)_proj", r"ca_\1\2_proj"),
    (r"encoder_attn\.v_proj", "ca_v_proj"),
    (r"encoder_attn\.", "cross_attn."),
    (r"decoder\.layernorm\.", "decoder.norm."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
)
_DEFORMABLE_DECODER: Rules = (
    (r"(decoder\.layers\.\d+\.)self_attn_layer_norm\.", r"\1norm2."),
    (r"(decoder\.layers\.\d+\.)encoder_attn_layer_norm\.", r"\1norm1."),
    (r"(decoder\.layers\.\d+\.)final_layer_norm\.", r"\1norm3."),
    (r"encoder_attn\.", "cross_attn."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
)
_REST: Rules = ((r"^model\.", "transformer."),)
RULES: dict[str, Rules] = {
    "dab-detr": (*_BACKBONE, *_ENCODER, *_DAB_DECODER, *_SHARED, *_REST),
    "conditional_detr": (*_BACKBONE, *_ENCODER, *_CONDITIONAL_DECODER, *_SHARED, *_REST),
    "deformable_detr": (*_BACKBONE, *_ENCODER, *_DEFORMABLE_DECODER, *_SHARED, *_REST),
}
# What Conditional DETR has and DAB-DETR does not: positions of queries instead of anchors, a head that reads points.
_ONLY_CONDITIONAL = ("query_position_embeddings.", "ref_point_head.")
_SEPARATE = re.compile(r"^(.*self_attn\.)([qkv])_proj\.(weight|bias)$")


def rename(name: str, model_type: str) -> str:
    """Return our name of a tensor; query, key and value projections of a fused attention keep theirs."""
    for pattern, replacement in RULES[model_type]:
        name = re.sub(pattern, replacement, name)
    return name


def convert(weights: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Return the weights under our names, query, key and value projections fused where ours are.

    Args:
        weights: state dict of the object-detection class, or content of its file.
        model_type: key of `RULES`.
    """
    converted: dict[str, Tensor] = {}
    separate: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        if model_type == "conditional_detr" and any(part in name for part in _ONLY_CONDITIONAL):
            continue
        ours = rename(name, model_type)
        part = _SEPARATE.match(ours)
        if part:
            separate.setdefault(f"{part[1]}in_proj_{part[3]}", {})[part[2]] = value
        else:
            converted[ours] = value
    for name, parts in separate.items():
        if set(parts) != set("qkv"):
            raise CheckpointError(
                f"expected q_proj, k_proj and v_proj for {name}, found {', '.join(sorted(parts))}_proj"
            )
        converted[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return converted


def fill_tied_heads(weights: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Give class heads that a file leaves out the values of the first: transformers 5 ties them and writes one.

    Args:
        weights: under our names; names: all names of our model.
    """
    filled = dict(weights)
    for name in names:
        first = re.sub(r"^class_embed\.\d+\.", "class_embed.0.", name)
        if name not in weights and first in weights:
            filled[name] = weights[first]
    return filled


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our options of a `config.json`.

    Raises:
        CheckpointError: a model or a setting that has no counterpart here.
    """
    kind = config.get("model_type")
    if kind not in MODEL_NAMES:
        raise CheckpointError(f"expected config.json of one of {', '.join(MODEL_NAMES)}, got model_type '{kind}'")
    names = {**OPTIONS, **OWN_OPTIONS.get(kind, {})}
    lacking = [name for name in (*names.values(), *(f"decoder_{twin}" for twin in TWINS)) if name not in config]
    if lacking:
        raise CheckpointError(f"config.json does not say {', '.join(lacking)}: save the model with transformers again")
    for twin in TWINS:
        encoder, decoder = config[f"encoder_{twin}"], config[f"decoder_{twin}"]
        if encoder != decoder:
            raise CheckpointError(
                f"encoder_{twin} {encoder} and decoder_{twin} {decoder} differ, here they are one option"
            )
    if config.get("keep_query_pos"):
        raise CheckpointError("keep_query_pos of config.json has no counterpart here: this model cannot be converted")
    options = {ours: config[theirs] for ours, theirs in names.items()}
    options |= {
        "modelname": MODEL_NAMES[kind],
        "backbone": backbone_of(config),
        "dilation": bool(config.get("dilation")),
        "hidden_dim": config.get("hidden_size", config.get("d_model")),
        "dropout": float(config.get("dropout", 0.0)),
    }
    if options.get("two_stage"):
        options["num_queries"] = config["two_stage_num_proposals"]
    return options


def backbone_of(config: Mapping[str, Any]) -> str:
    """Return our name of the ResNet that a `config.json` describes.

    Raises:
        CheckpointError: another backbone.
    """
    inner = config.get("backbone_config") or {}
    name = inner.get("backbone") or config.get("backbone")
    if inner.get("model_type") == "resnet":
        depths = (inner.get("layer_type", "bottleneck"), tuple(inner.get("depths", (3, 4, 6, 3))))
        name = {
            ("basic", (2, 2, 2, 2)): "resnet18",
            ("basic", (3, 4, 6, 3)): "resnet34",
            ("bottleneck", (3, 4, 6, 3)): "resnet50",
            ("bottleneck", (3, 4, 23, 3)): "resnet101",
        }.get(depths)
    name = (name or "").split(".")[0]  # timm appends the name of the weights
    if name not in ("resnet18", "resnet34", "resnet50", "resnet101"):
        raise CheckpointError(f"expected a ResNet-18, 34, 50 or 101 in config.json, got '{name or inner}'")
    return name


def class_names_of(config: Mapping[str, Any]) -> list[str] | None:
    """Return the class of every label, None where `config.json` names none."""
    names = {int(label): name for label, name in (config.get("id2label") or {}).items()}
    return [names.get(label, "N/A") for label in range(max(names) + 1)] if names else None
