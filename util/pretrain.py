"""Start from another model's weights: what fits is taken, class rows are matched by name, the rest is reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint, model_weights
from .errors import CheckpointError

# Tensors with one row per class; label_enc has one more, for "no object".
CLASS_ROWS = ("class_embed", "label_enc")
UNUSED_NAMES = ("", "N/A")
_log = logging.getLogger(__name__)


class PretrainReport(NamedTuple):
    """What became of a checkpoint's weights.

    Attributes:
        taken: names copied whole; by_class: names of which the rows of classes with equal names were copied.
        classes_taken, classes_new: the model's classes whose rows were copied, and those that keep initial values;
            empty when rows were not matched by name.
        ignored: left out on request; unfit: of another shape or unknown to the model; untouched: the model's names
            that got nothing.
    """

    taken: list[str]
    by_class: list[str]
    ignored: list[str]
    unfit: list[str]
    untouched: list[str]
    classes_taken: list[str]
    classes_new: list[str]

    def __str__(self) -> str:
        lines = [f"took {len(self.taken)} tensors whole and {len(self.by_class)} by class name"]
        for what, names in (
            ("classes known to the checkpoint", self.classes_taken),
            ("classes that start anew", self.classes_new),
            ("left out on request", self.ignored),
            ("does not fit", self.unfit),
            ("keeps its initial value", self.untouched),
        ):
            if names:
                lines.append(f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}")
        return "; ".join(lines)


def load_pretrained_file(
    model: nn.Module,
    source: str,
    *,
    ignore: Sequence[str] = (),
    model_classes: Sequence[str] | None = None,
    coco_names: Mapping[int, str],
) -> PretrainReport:
    """Copy what fits from a file or https address (`--pretrain_model_path`); see `load_pretrained`.

    Args:
        coco_names: category id -> name. Official files carry no names; those with as many classes as COCO were
            trained on it.

    Raises:
        CheckpointError: the file cannot be read, or nothing fits.
    """
    content = load_checkpoint(source)
    weights = model_weights(content, source)
    names = content.get("class_names")
    if names is None and class_count(weights) == max(coco_names) + 1:
        names = [coco_names.get(label, "N/A") for label in range(max(coco_names) + 1)]
    return load_pretrained(model, weights, ignore=ignore, source_classes=names, model_classes=model_classes)


def load_pretrained(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    ignore: Sequence[str] = (),
    source_classes: Sequence[str] | None = None,
    model_classes: Sequence[str] | None = None,
) -> PretrainReport:
    """Copy what fits into a model.

    Args:
        model: receives the weights.
        weights: from `checkpoint.model_weights`.
        ignore: parts of names to leave out (`--finetune_ignore`).
        source_classes, model_classes: class name of every label; known on both sides, class rows are copied name by
            name, also when the counts are equal.

    Raises:
        CheckpointError: nothing fits, or the class counts differ and names are missing on one side.
    """
    own = model.state_dict()
    names_known = bool(source_classes) and bool(model_classes)
    pairs = matching_classes(source_classes or (), model_classes or ()) if names_known else []
    same_classes = not names_known or list(source_classes or ()) == list(model_classes or ())
    report = PretrainReport([], [], [], [], [], [], [])
    fitted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if any(part in name for part in ignore):
            report.ignored.append(name)
        elif name not in own:
            report.unfit.append(name)
        elif is_class_rows(name) and not (same_classes and value.shape == own[name].shape):
            if not names_known:
                raise CheckpointError(class_count_message(class_count(weights), class_count(own)))
            fitted[name] = _copy_rows(own[name], value, pairs, has_no_object_row="label_enc" in name)
            report.by_class.append(name)
        elif value.shape != own[name].shape:
            report.unfit.append(name)
        else:
            fitted[name] = value
            report.taken.append(name)
    if not fitted:
        raise CheckpointError(f"none of the checkpoint's {len(weights)} tensors fits the model: is it another model's?")
    report.untouched.extend(name for name in own if name not in fitted)
    if report.by_class:
        known = {label for _, label in pairs}
        used = [(label, name) for label, name in enumerate(model_classes or ()) if name not in UNUSED_NAMES]
        report.classes_taken.extend(name for label, name in used if label in known)
        report.classes_new.extend(name for label, name in used if label not in known)
    model.load_state_dict(fitted, strict=False)
    _log.info("weights: %s", report)
    return report


def matching_classes(source: Sequence[str], own: Sequence[str]) -> list[tuple[int, int]]:
    """Return (source label, own label) of the class names that both sides have; case and unused names do not count."""
    by_name = {name.lower(): label for label, name in enumerate(source) if name not in UNUSED_NAMES}
    return [(by_name[name.lower()], label) for label, name in enumerate(own) if name.lower() in by_name]


def is_class_rows(name: str) -> bool:
    """Return whether a tensor of this name has one row per class."""
    return any(part in name for part in CLASS_ROWS)


def class_count(weights: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes that weights were made for, None when they have no class head."""
    return next((len(value) for name, value in weights.items() if "class_embed" in name), None)


def class_count_message(checkpoint: int | None, model: int | None) -> str:
    """Say that the class counts differ and what to do."""
    return f"checkpoint has {checkpoint} classes, the model {model}: pass --finetune_ignore {' '.join(CLASS_ROWS)}"


def _copy_rows(own: Tensor, source: Tensor, pairs: Sequence[tuple[int, int]], *, has_no_object_row: bool) -> Tensor:
    result = own.clone()
    if pairs:
        from_rows, to_rows = torch.tensor(pairs).unbind(1)
        result[to_rows] = source[from_rows].to(result)
    if has_no_object_row:
        result[-1] = source[-1].to(result)
    return result
