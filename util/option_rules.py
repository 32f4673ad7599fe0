"""Which options have no meaning for a model or without another option: each is honoured or refused with a reason."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionError
from .options import model_defaults


@dataclass(frozen=True)
class Refusal:
    """Why a value other than the default is refused.

    Attributes:
        reason: the end of a sentence that starts with the option.
        allowed: other values that say what the model does anyway.
    """

    reason: str
    allowed: tuple[Any, ...] = ()


_NO_MASKS = Refusal("needs the segmentation head, which is not available yet")
EVERY_MODEL = {
    "masks": _NO_MASKS,
    "frozen_weights": _NO_MASKS,
    "mask_loss_coef": _NO_MASKS,
    "dice_loss_coef": _NO_MASKS,
    "coco_panoptic_path": Refusal("needs the panoptic data set, which is not available yet"),
    "eos_coef": Refusal(
        "weighs the 'no object' class of a softmax; these models use the focal loss, see --focal_alpha"
    ),
    "lr_drop_epochs": Refusal("is not supported: the rate drops every --lr_drop epochs"),
    "position_embedding_scale": Refusal("is fixed at 2 pi"),
    "return_interm_layers": Refusal("is decided by the model, see --num_feature_levels of the deformable ones"),
}
_ALWAYS_REFINES = Refusal("cannot be turned off here", (True,))
_NO_DEFORMABLE = Refusal("has no meaning here: the attention of this model is not deformable")
_NO_PROPOSALS = Refusal("has no meaning here: this model has no encoder proposals")
_ONLY_DINO = Refusal("belongs to dn_dab_dino_deformable_detr")
_NOT_DINO = {"num_results": Refusal("belongs to dn_dab_dino_deformable_detr; here it is --num_select"),
             "use_mqs": _ONLY_DINO, "use_lft": _ONLY_DINO}  # fmt: skip
_DEFORMABLE = {
    "pe_temperatureH": Refusal("is fixed at 10000 in the deformable models", (10000,)),
    "pe_temperatureW": Refusal("is fixed at 10000 in the deformable models", (10000,)),
    "pre_norm": Refusal("has no meaning here: the deformable layers are post-norm"),
}
_HUNDRED_RESULTS = {"num_select": Refusal("is fixed: this model keeps 100 results", (100,))}
_NO_ANCHORS = Refusal("has no meaning here: this model has no anchor queries")
FAMILIES: dict[str, dict[str, Refusal]] = {
    "dab": {
        **_NOT_DINO,
        "num_feature_levels": _NO_DEFORMABLE,
        "dec_n_points": _NO_DEFORMABLE,
        "enc_n_points": _NO_DEFORMABLE,
        "two_stage": _NO_PROPOSALS,
        "with_box_refine": _ALWAYS_REFINES,
    },
    "encoder_only": {
        **_NOT_DINO,
        "dec_n_points": Refusal("has no meaning here: only the encoder is deformable"),
        "cls_loss_coef": Refusal("is fixed at 1 in this model"),
        "pre_norm": Refusal("has no meaning here: the deformable layers are post-norm"),
        "two_stage": _NO_PROPOSALS,
        "with_box_refine": _ALWAYS_REFINES,
    },
    "dab_deformable": {**_NOT_DINO, **_DEFORMABLE, **_HUNDRED_RESULTS, "with_box_refine": _ALWAYS_REFINES},
    "dino": {
        **_DEFORMABLE,
        "num_select": Refusal("is --num_results in this model"),
        "with_box_refine": _ALWAYS_REFINES,
    },
    "deformable": {
        **_NOT_DINO,
        **_DEFORMABLE,
        **_HUNDRED_RESULTS,
        "num_patterns": _NO_ANCHORS,
        "random_refpoints_xy": _NO_ANCHORS,
    },
}
DENOISING_OPTIONS = (
    "scalar",
    "label_noise_scale",
    "box_noise_scale",
    "contrastive",
    "dn_number",
    "dn_normalizer",
    "dn_mask_padding",
)
# option -> the one it needs. Only looked at on the command line: a shared configuration file may hold both.
NEEDS: dict[str, str] = {
    **dict.fromkeys(DENOISING_OPTIONS, "use_dn"),
    "amp_dtype": "amp",
    "ema_decay": "ema",
    "override_resumed_lr_drop": "resume",
    "drop_lr_now": "resume",
    "finetune_ignore": "pretrain_model_path",
    **dict.fromkeys(("tensorboard", "wandb_project", "mlflow_experiment"), "output_dir"),
    "mlflow_uri": "mlflow_experiment",
    "save_results": "output_dir",
    "save_log": "output_dir",
    "checkpoint_steps": "output_dir",
    "checkpoint_minutes": "output_dir",
    "on_save_error": "output_dir",
    "keep_checkpoints": "output_dir",
    "save_checkpoint_interval": "output_dir",
}
# Places a training is followed at; `--eval` writes its figures to log.txt alone.
TRACKERS = ("tensorboard", "wandb_project", "mlflow_experiment")
# option -> least value, greatest value (None: no bound).
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    **dict.fromkeys(("batch_size", "accumulate_steps", "epochs", "lr_drop", "save_checkpoint_interval"), (1, None)),
    **dict.fromkeys(("print_freq", "keep_checkpoints", "num_queries", "num_select", "num_results"), (1, None)),
    **dict.fromkeys(("enc_layers", "checkpoint_steps", "num_workers", "start_epoch", "dn_number"), (0, None)),
    "size_bucket": (0, None),
    "log_pictures_every": (0, None),
    **dict.fromkeys(("lr", "weight_decay", "clip_max_norm", "box_noise_scale", "num_patterns", "seed"), (0, None)),
    **dict.fromkeys(("dec_layers", "nheads", "hidden_dim", "dim_feedforward", "num_classes"), (1, None)),
    **dict.fromkeys(
        ("eval_scale", "data_aug_max_size", "num_feature_levels", "dec_n_points", "enc_n_points"), (1, None)
    ),
    **dict.fromkeys(("label_noise_scale", "ema_decay", "dropout"), (0, 1)),
    "world_size": (1, None),
    **dict.fromkeys(("rank", "checkpoint_minutes", "dist_timeout"), (0, None)),
}


def model_family(modelname: str) -> str:
    """Return which set of rules a model name falls under."""
    if "dino" in modelname:
        return "dino"
    if "encoder_only" in modelname:
        return "encoder_only"
    if "deformable" in modelname:
        return "dab_deformable" if "dab" in modelname or modelname.startswith("dn_") else "deformable"
    return "dab"


def check_options(
    args: argparse.Namespace,
    defaults: Mapping[str, Any],
    command_line: Mapping[str, Any],
    from_files: Mapping[str, Any],
) -> None:
    """Refuse what would be ignored.

    Only values that were given and differ from the default are refused.

    Args:
        args: every option.
        defaults: the parser's own defaults.
        command_line: what stands on the command line.
        from_files: what stands in the configuration.

    Raises:
        OptionError: the first thing refused, with its reason.
    """
    own_defaults = {**defaults, **model_defaults(args.modelname)}
    given = {name: vars(args)[name] for name in (*from_files, *command_line)}
    changed = {name: value for name, value in given.items() if value != own_defaults[name]}
    for message in _complaints(args, changed, command_line):
        raise OptionError(message)


def _complaints(args: argparse.Namespace, changed: Mapping[str, Any], command_line: Mapping[str, Any]) -> Iterator[str]:
    by_hand = changed.keys() & command_line.keys()
    for name, refusal in {**EVERY_MODEL, **FAMILIES[model_family(args.modelname)]}.items():
        if name in changed and changed[name] not in refusal.allowed:
            yield f"--{name} {refusal.reason} (model {args.modelname})"
    if args.dataset_file == "coco_panoptic":
        yield "--dataset_file coco_panoptic is not available yet: use coco, or another name for own data"
    if not args.modelname.startswith("dn_"):
        for name in ("use_dn", *DENOISING_OPTIONS):
            if name in changed:
                yield f"--{name} has no meaning here: {args.modelname} trains without denoising"
    for name, needed in NEEDS.items():
        if name in by_hand and not getattr(args, needed) and not (needed == "use_dn" and args.eval):
            yield f"--{name} has no effect without --{needed}"
    if "log_instability" in by_hand and args.eval:
        yield "--log_instability compares epochs: it has no effect with --eval"
    if command_line.get("use_mqs") and not args.two_stage:
        yield "--use_mqs mixes encoder proposals with learned queries: it needs --two_stage"
    yield from _combinations(args, by_hand)
    yield from _out_of_bounds(args)


def _combinations(args: argparse.Namespace, by_hand: set[str]) -> Iterator[str]:
    if args.pretrain_model_path and args.resume and args.resume != "auto":
        yield "--resume restores everything and --pretrain_model_path only weights: pass one of them"
    if args.resume == "auto" and not args.output_dir:
        yield "--resume auto looks for checkpoints in --output_dir: pass it"
    if args.use_dn and args.scalar < 1 and not args.dn_number:
        yield f"--scalar expects at least one denoising group, got {args.scalar}: leave out --use_dn for none"
    if args.coco_path is None and args.dataset_file != "coco":
        yield f"--dataset_file {args.dataset_file} needs --coco_path, the folder of that data"
    if "log_pictures_every" in by_hand and not any(getattr(args, name) for name in TRACKERS):
        yield f"--log_pictures_every has no effect without a tracker: --{', --'.join(TRACKERS)}"
    for name in TRACKERS if args.eval else ():
        if name in by_hand:
            yield f"--{name} follows a training and has no effect with --eval, which writes log.txt"
    if "aspect_ratio_grouping" in by_hand and (args.batch_size == 1 or args.fix_size):
        why = "--fix_size" if args.fix_size else "--batch_size 1"
        yield f"--aspect_ratio_grouping has no effect with {why}: batches have no padding then"
    unused = ("data_aug_scales", "data_aug_scales2_resize", "data_aug_scales2_crop")
    for name in unused if args.fix_size else ():
        if name in by_hand:
            yield f"--{name} has no effect with --fix_size"


def _out_of_bounds(args: argparse.Namespace) -> Iterator[str]:
    for name, (least, greatest) in BOUNDS.items():
        value = getattr(args, name)
        if value is None:
            continue
        if (least is not None and value < least) or (greatest is not None and value > greatest):
            expected = f"at least {least}" if greatest is None else f"a value from {least} to {greatest}"
            yield f"--{name} expects {expected}, got {value}"
