"""Turn a checkpoint of another code base into one of this, or back: `python -m tools.convert_checkpoint IN OUT`.

IN is a checkpoint of DN-DETR, DAB-DETR, Deformable-DETR or of this code base, the folder or file of a Hugging Face
transformers model (DAB-DETR, Deformable DETR, Conditional DETR), or backbone weights in the naming of torchvision or
timm. What it is, is seen from the names of its tensors. OUT ends in .pth or .safetensors.

Official files and ours have the same names, shapes and order, so that converting one into the other changes nothing but
what stands beside the weights; the tool checks that. Models are described by the options in the file, else by options
of main.py after `--`: `... IN OUT -- -m dn_dab_detr --num_patterns 3`. Backbone weights, and Conditional DETR, fill a
part of a detector: use the result with `main.py --pretrain_model_path`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import main as program
from datasets.coco_names import COCO_NAMES
from models import build_model
from tools.conversion import hugging_face
from util.checkpoint import SAFETENSORS, atomic_save, load_checkpoint, model_weights
from util.errors import CheckpointError
from util.pretrain import class_count

# Options that decide which tensors a detector has, or what it computes with them.
MODEL_OPTIONS = (
    *("modelname", "backbone", "backbone_stages", "dilation", "batch_norm_type", "position_embedding"),
    *("pe_temperatureH", "pe_temperatureW", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "dropout"),
    *("nheads", "num_queries", "num_select", "num_results", "pre_norm", "transformer_activation", "num_patterns"),
    *("two_stage", "with_box_refine", "num_feature_levels", "dec_n_points", "enc_n_points", "use_dn"),
    *("use_mqs", "use_lft", "aux_loss", "num_classes"),
)
# Options that say what pictures the detector is used to, and what its labels stand for.
DATA_OPTIONS = ("eval_scale", "data_aug_max_size", "label_mapping")
KEPT_OPTIONS = (*MODEL_OPTIONS, *DATA_OPTIONS)
# The official code never reads these; its DINO-style model always does the first two, its batch norm is always frozen.
UNREAD = ("use_mqs", "use_lft", "batch_norm_type")
SHARDED = "model.safetensors.index.json"


class Source(NamedTuple):
    """What a file holds.

    Attributes:
        kind: "detector", "backbone", or a model type of transformers.
        weights: name -> tensor.
        options: what the file says about its model, our names.
        class_names: of every label, None where the file is silent.
        category_ids: of every label in the data set it was trained on, likewise.
        ordered: the order of the weights means something; files of safetensors have their own.
        averaged: the weights are the average of `--ema`.
    """

    kind: str
    weights: dict[str, Tensor]
    options: dict[str, Any]
    class_names: Sequence[str] | None
    category_ids: Sequence[int] | None
    ordered: bool
    averaged: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the weights are those of a whole detector, not of a part of one."""
        return self.kind not in ("backbone", "conditional_detr")

    def named_as_ours(self) -> dict[str, Tensor]:
        """Return the weights under our names."""
        if self.kind in hugging_face.RULES:
            return hugging_face.convert(self.weights, self.kind)
        return self.weights


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file; return the exit status, after one sentence on stderr when something is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of one of our checkpoints")
    args = parser.parse_args(arguments[:split])
    try:
        source = read_source(args.input, ema=args.ema)
        options = model_options(source, arguments[split + 1 :])
        weights, missing = convert(source, options, args.input)
        names = class_names(source, weights)
        write(args.output, weights, vars(options), names, source.category_ids)
    except (CheckpointError, ValueError) as error:
        sys.stderr.write(f"convert_checkpoint: error: {error}\n")
        return 1
    print(f"{source.kind} {args.input} -> {args.output}: {len(weights)} tensors of {options.modelname}")
    if missing:
        print(f"not in it: {', '.join(missing[:8])}{f' and {len(missing) - 8} more' if len(missing) > 8 else ''}")
    return 0


def read_source(path: Path, *, ema: bool | None = False) -> Source:
    """Read a file or a folder and see what it is.

    Args:
        ema: take the averaged weights; None takes them where there are some.

    Raises:
        CheckpointError: nothing readable, or averaged weights were asked for and there are none.
    """
    folder = path if path.is_dir() else path.parent
    config_file = folder / "config.json"
    file = weights_file(path) if path.is_dir() else path
    content = load_checkpoint(file)
    averaged = "ema" in content if ema is None else ema
    if averaged:
        if "ema" not in content:
            raise CheckpointError(f"{file} holds no averaged weights: leave out --ema")
        content = {**content, "model": content["ema"]["model"]}
    weights = model_weights(content, file)
    if any(name.startswith(("model.encoder.", "model.decoder.")) for name in weights):
        if not config_file.is_file():
            raise CheckpointError(f"expected transformers' config.json beside {file}: pass the folder of the model")
        config = json.loads(config_file.read_text(encoding="utf-8"))
        options = hugging_face.options_of(config)
        return Source(config["model_type"], weights, options, hugging_face.class_names_of(config), None, False)
    if any(name.startswith("transformer.") for name in weights):
        ordered = file.suffix != SAFETENSORS
        names, categories = content.get("class_names"), content.get("category_ids")
        return Source("detector", weights, stored_options(content), names, categories, ordered, averaged)
    return Source("backbone", weights, {}, None, None, False)


def weights_file(folder: Path) -> Path:
    """Return the file with the weights of a transformers model.

    Raises:
        CheckpointError: there is none, or they are spread over several.
    """
    if (folder / SHARDED).is_file():
        raise CheckpointError(f"the weights in {folder} are in several files: save the model again in one shard")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"no model.safetensors or pytorch_model.bin in {folder}: pass a file or another folder")


def stored_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a detector's file: ours under "options", official ones under "args"."""
    if "options" in content:
        return {name: content["options"][name] for name in KEPT_OPTIONS if name in content["options"]}
    if "args" not in content:
        return {}
    official = {"modelname": "deformable_detr", **vars(content["args"])}
    return {name: official[name] for name in KEPT_OPTIONS if name in official and name not in UNREAD}


def model_options(source: Source, given: Sequence[str]) -> argparse.Namespace:
    """Return the options of the model: those given on the command line, else those in the file, else defaults.

    Raises:
        CheckpointError: neither names a model, or options of the model stand behind --options.
    """
    if "--options" in given:
        raise CheckpointError("options of the model stand behind `--` as they are: leave out --options")
    stored = dict(source.options)
    classes = class_count(source.named_as_ours())
    if classes is not None:
        stored["num_classes"] = classes
    if "modelname" not in stored and not {"-m", "--modelname", "--config_file"} & set(given):
        raise CheckpointError("the file does not say which model it is: pass `-- -m MODEL` and its options")
    from_file = [f"{name}={value!r}" for name, value in stored.items() if value is not None]
    argv = [*given, "--backbone_weights", "none", *(["--options", *from_file] if from_file else [])]
    return program.parse_args(argv)


def convert(source: Source, options: argparse.Namespace, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under our names and in our order, and the model's names that they leave out.

    Args:
        source: what was read from `path`; options: of the model.

    Raises:
        CheckpointError: names or shapes do not fit the model.
    """
    if source.kind == "backbone":
        # The backbone's own loading knows both namings and checks them.
        options = argparse.Namespace(**{**vars(options), "backbone_weights": str(path)})
        model, _, _ = build_model(options)
        everything = model.state_dict()
        filled = {name: value for name, value in everything.items() if name.startswith("backbone.0.")}
        return filled, [name for name in everything if name not in filled]
    with torch.device("meta"):
        model, _, _ = build_model(options)
    weights = source.named_as_ours()
    if source.kind in hugging_face.RULES:
        weights = hugging_face.fill_tied_heads(fill_aliases(model, weights), model.state_dict())
    return check(model, weights, partial=not source.is_whole, ordered=source.ordered)


def fill_aliases(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every name that a model has for one tensor the value that is there under any of them.

    Raises:
        CheckpointError: two names of one tensor have different values.
    """
    names_of: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names_of.setdefault(id(tensor), []).append(name)
    filled = dict(weights)
    for names in names_of.values():
        there = [name for name in names if name in weights]
        for name in there[1:]:
            if not torch.equal(weights[name], weights[there[0]]):
                raise CheckpointError(f"{there[0]} and {name} are one tensor in this model, but differ in the file")
        filled |= {name: weights[there[0]] for name in names if there}
    return filled


def check(
    model: nn.Module, weights: dict[str, Tensor], *, partial: bool, ordered: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights in the order of the model, and the names it has beyond them.

    Args:
        partial: tensors may be missing.
        ordered: the weights must be in the model's order already, on which optimizer states depend.

    Raises:
        CheckpointError: unknown or missing names, other shapes, another order.
    """
    own = model.state_dict()
    unknown = [name for name in weights if name not in own]
    missing = [name for name in own if name not in weights]
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    for names, problem in (
        (unknown, "unknown to it"),
        ([] if partial else missing, "missing"),
        (shapes, "of another shape"),
    ):
        if names:
            raise CheckpointError(
                f"the weights do not fit the model: {len(names)} tensors are {problem}, such as {names[0]}; "
                "describe the model with options of main.py after `--`"
            )
    if ordered and list(weights) != list(own):
        first = next(name for name, expected in zip(weights, own, strict=True) if name != expected)
        raise CheckpointError(f"the tensors are in another order than the model's, from {first} on")
    return {name: weights[name] for name in own if name in weights}, missing


def class_names(source: Source, weights: Mapping[str, Tensor]) -> list[str] | None:
    """Return the class of every label; files with as many classes as COCO and no names were trained on it."""
    if source.class_names is not None:
        return list(source.class_names)
    if class_count(dict(weights)) == max(COCO_NAMES) + 1:
        return [COCO_NAMES.get(label, "N/A") for label in range(max(COCO_NAMES) + 1)]
    return None


def write(
    path: Path,
    weights: Mapping[str, Tensor],
    options: Mapping[str, Any],
    names: Sequence[str] | None,
    category_ids: Sequence[int] | None = None,
) -> None:
    """Write a checkpoint with its options and class names; every code base of the family reads its "model".

    Raises:
        CheckpointError: the name ends in neither .pth nor .safetensors, or the file cannot be written.
    """
    beside: dict[str, Any] = {"options": {name: options[name] for name in KEPT_OPTIONS}}
    if names is not None:
        beside["class_names"] = list(names)
    if category_ids is not None:
        beside["category_ids"] = list(category_ids)
    if path.suffix == ".pth":
        atomic_save({"model": dict(weights), **beside}, path)
    elif path.suffix == SAFETENSORS:
        # The format has no two names for one tensor.
        tensors = {name: value.detach().clone().contiguous() for name, value in weights.items()}
        metadata = {"format": "pt", **{key: json.dumps(value) for key, value in beside.items()}}
        save_file(tensors, path, metadata=metadata)
    else:
        raise CheckpointError(f"expected a name ending in .pth or .safetensors, got {path.name}")


if __name__ == "__main__":
    sys.exit(main())
