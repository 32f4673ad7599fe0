"""Every option of the command line: name, default and meaning, in groups.

Names and defaults are those of DN-DETR's own command line where it has the option. `MODEL_DEFAULTS` holds what the
repositories of the other models set differently.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

DAB_DEFAULTS: dict[str, Any] = {"epochs": 300, "lr_drop": 200, "save_checkpoint_interval": 100}
DEFORMABLE_DEFAULTS: dict[str, Any] = {
    "lr": 2e-4,
    "lr_backbone": 2e-5,
    "lr_backbone_names": ["backbone.0"],
    "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
    "save_checkpoint_interval": 5,
    "dim_feedforward": 1024,
    "dropout": 0.1,
    "cls_loss_coef": 2,
    "num_workers": 2,
}
# The official code never reads the two options and always runs with both on.
DINO_DEFAULTS = {"use_mqs": True, "use_lft": True}
# By the start of the model name; the longest start that fits counts.
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "dab_": DAB_DEFAULTS,
    "deformable_detr": DEFORMABLE_DEFAULTS,
    "dn_dab_dino_": DINO_DEFAULTS,
}


def model_defaults(modelname: str) -> dict[str, Any]:
    """Return the defaults in which a model's own repository differs from DN-DETR's."""
    starts = [start for start in MODEL_DEFAULTS if modelname.startswith(start)]
    return MODEL_DEFAULTS[max(starts, key=len)] if starts else {}


def build_parser(model_names: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser of all options, without ``--help`` so that it can be a parent.

    Args:
        model_names: the choices of ``--modelname``.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_config_options(parser)
    add_denoising_options(parser)
    add_optimizer_options(parser)
    add_model_options(parser, model_names)
    add_transformer_options(parser)
    add_loss_options(parser)
    add_data_options(parser)
    add_run_options(parser)
    add_tracker_options(parser)
    add_checkpoint_options(parser)
    add_process_options(parser)
    return parser


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add where defaults come from."""
    group = parser.add_argument_group("configuration file")
    group.add_argument(
        "--config_file", metavar="FILE", help="flat Python file of option values; this line wins over it"
    )
    group.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="values that win over --config_file")


def add_denoising_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of denoising training."""
    group = parser.add_argument_group("denoising")
    group.add_argument("--use_dn", action="store_true", help="train with denoising queries")
    group.add_argument("--scalar", default=5, type=int, help="denoising groups per image")
    group.add_argument("--label_noise_scale", default=0.2, type=float, help="probability of a random label")
    group.add_argument("--box_noise_scale", default=0.4, type=float, help="box noise relative to half the box")
    group.add_argument("--contrastive", action="store_true", help="add a negative query for every known object")
    group.add_argument(
        "--use_mqs",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mixed query selection, with --two_stage; on in the DINO-style model, the only one that has it",
    )
    group.add_argument(
        "--use_lft",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="look forward twice; on in the DINO-style model, the only one that can switch it",
    )
    group.add_argument(
        "--dn_number",
        default=0,
        type=int,
        help="denoising query budget per image; 0: --scalar groups whatever the size",
    )
    group.add_argument(
        "--dn_normalizer",
        default="local",
        choices=("local", "global"),
        help="divide denoising losses by the objects of this process (official) or by the mean over processes",
    )
    group.add_argument("--dn_mask_padding", action="store_true", help="nothing attends to empty denoising slots")


def add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    """Add learning rates, schedule, clipping and precision."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", default=1e-4, type=float)
    group.add_argument("--lr_backbone", default=1e-5, type=float, help="0 or less freezes the backbone")
    group.add_argument(
        "--lr_backbone_names", default=["backbone"], type=str, nargs="+", help="parts of parameter names"
    )
    group.add_argument("--lr_linear_proj_names", default=[], type=str, nargs="+", help="parts of parameter names")
    group.add_argument("--lr_linear_proj_mult", default=0.1, type=float, help="factor on --lr for those parameters")
    group.add_argument("--batch_size", default=2, type=int, help="images per process and forward pass")
    group.add_argument("--accumulate_steps", default=1, type=int, help="forward passes per optimizer step")
    group.add_argument("--weight_decay", default=1e-4, type=float)
    group.add_argument("--epochs", default=50, type=int)
    group.add_argument("--lr_drop", default=40, type=int, help="epochs between two tenfold drops of the rate")
    group.add_argument("--lr_drop_epochs", default=None, type=int, nargs="+")
    group.add_argument("--clip_max_norm", default=0.1, type=float, help="most gradient norm; 0 does not clip")
    group.add_argument("--sgd", action="store_true", help="SGD with momentum 0.9 instead of AdamW")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument(
        "--amp_dtype", choices=("float16", "bfloat16"), help="with --amp; default float16 on CUDA, bfloat16 on a CPU"
    )
    group.add_argument(
        "--checkpoint_activations",
        action="store_true",
        help="compute layers again in the backward pass instead of keeping their activations: less memory, more time",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="generate machine code for the layers (torch.compile) in the first steps; needs a C++ compiler",
    )
    group.add_argument("--ema", action="store_true", help="average the weights over time and evaluate the average")
    group.add_argument("--ema_decay", default=0.9997, type=float)


def add_model_options(parser: argparse.ArgumentParser, model_names: Sequence[str]) -> None:
    """Add the model, its backbone and position encoding."""
    group = parser.add_argument_group("model")
    group.add_argument("--modelname", "-m", choices=tuple(model_names), help="which model to build; has no default")
    group.add_argument("--frozen_weights", default=None, type=str)
    group.add_argument("--backbone", default="resnet50", type=str, help="resnet18/34/50/101 or timm:NAME")
    group.add_argument(
        "--backbone_weights", default="imagenet", metavar="imagenet|none|FILE", help="where the backbone starts"
    )
    group.add_argument(
        "--backbone_stages", default=4, type=int, choices=(1, 2, 3, 4), help="residual stages kept; 3 ends at stride 16"
    )
    group.add_argument("--dilation", action="store_true", help="DC5: dilate instead of stride in the last stage")
    group.add_argument("--position_embedding", default="sine", type=str, choices=("sine", "learned"))
    group.add_argument("--position_embedding_scale", default=6.283185307179586, type=float)
    group.add_argument("--pe_temperatureH", default=20, type=int, help="vertical temperature of the sine encoding")
    group.add_argument("--pe_temperatureW", default=20, type=int, help="horizontal temperature of the sine encoding")
    group.add_argument(
        "--batch_norm_type",
        default="FrozenBatchNorm2d",
        type=str,
        choices=("SyncBatchNorm", "FrozenBatchNorm2d", "BatchNorm2d"),
    )
    group.add_argument("--return_interm_layers", action="store_true")
    group.add_argument("--backbone_freeze_keywords", nargs="+", type=str, help="parts of backbone names kept fixed")
    group.add_argument("--num_classes", default=None, type=int, help="labels 0..N-1; left out: from the data set")


def add_transformer_options(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the transformer."""
    group = parser.add_argument_group("transformer")
    group.add_argument("--enc_layers", default=6, type=int)
    group.add_argument("--dec_layers", default=6, type=int)
    group.add_argument("--dim_feedforward", default=2048, type=int)
    group.add_argument("--hidden_dim", default=256, type=int)
    group.add_argument("--dropout", default=0.0, type=float)
    group.add_argument("--nheads", default=8, type=int)
    group.add_argument("--num_queries", default=300, type=int, help="object queries (per pattern)")
    group.add_argument("--num_results", default=300, type=int, help="results per image of the DINO-style model")
    group.add_argument("--pre_norm", action="store_true", help="a LayerNorm after the encoder; layers stay post-norm")
    group.add_argument("--num_select", default=300, type=int, help="(query, class) pairs kept per image")
    group.add_argument("--transformer_activation", default="prelu", type=str)
    group.add_argument("--num_patterns", default=0, type=int, help="content patterns per anchor; 0 for none")
    group.add_argument("--random_refpoints_xy", action="store_true", help="start anchor centres uniformly")
    group.add_argument("--two_stage", action="store_true", help="queries from the best encoder proposals")
    group.add_argument("--with_box_refine", action="store_true", help="each decoder layer refines the boxes before it")
    group.add_argument("--num_feature_levels", default=4, type=int)
    group.add_argument("--dec_n_points", default=4, type=int)
    group.add_argument("--enc_n_points", default=4, type=int)


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    """Add loss weights and matching costs."""
    group = parser.add_argument_group("losses")
    group.add_argument("--masks", action="store_true")
    group.add_argument("--no_aux_loss", dest="aux_loss", action="store_false", help="no losses on earlier layers")
    group.add_argument("--set_cost_class", default=2, type=float)
    group.add_argument("--set_cost_bbox", default=5, type=float)
    group.add_argument("--set_cost_giou", default=2, type=float)
    group.add_argument("--cls_loss_coef", default=1, type=float)
    group.add_argument("--mask_loss_coef", default=1, type=float)
    group.add_argument("--dice_loss_coef", default=1, type=float)
    group.add_argument("--bbox_loss_coef", default=5, type=float)
    group.add_argument("--giou_loss_coef", default=2, type=float)
    group.add_argument("--eos_coef", default=0.1, type=float)
    group.add_argument("--focal_alpha", default=0.25, type=float)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add data set, sizes and loading."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_file", default="coco", help="coco, or any name for own data in the same layout")
    group.add_argument("--coco_path", default=None, type=str, help="data folder; left out: a generated data set")
    group.add_argument("--coco_panoptic_path", default=None, type=str)
    group.add_argument(
        "--label_mapping",
        default="ids",
        choices=("ids", "contiguous"),
        help="labels are the category ids (num_classes: greatest + 1), or 0..K-1 in their order",
    )
    group.add_argument("--remove_difficult", action="store_true", help="drop objects marked difficult")
    group.add_argument("--fix_size", action="store_true", help="resize training images to 1333x800")
    group.add_argument(
        "--data_aug_scales",
        default=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        type=int,
        nargs="+",
        help="short sides drawn in training",
    )
    group.add_argument("--data_aug_max_size", default=1333, type=int, help="longest side, training and evaluation")
    group.add_argument("--data_aug_scales2_resize", default=[400, 500, 600], type=int, nargs="+")
    group.add_argument("--data_aug_scales2_crop", default=[384, 600], type=int, nargs=2, metavar=("MIN", "MAX"))
    group.add_argument("--eval_scale", default=800, type=int, help="short side in evaluation")
    group.add_argument("--cache_dir", default="~/.cache/dn_detr", help="where the generated data set lies")
    group.add_argument("--cache_mode", action="store_true", help="keep image files in memory")
    group.add_argument("--skip_bad_images", action="store_true", help="count unreadable images and go on")
    group.add_argument(
        "--image_backend",
        default="pil",
        choices=("pil", "torch"),
        help="who decodes and resizes: pil gives the official pixels, torch nearly the same ones about twice as fast",
    )
    group.add_argument(
        "--aspect_ratio_grouping",
        action="store_true",
        help="training batches of wide images or of tall ones, for less padding",
    )
    group.add_argument(
        "--size_bucket",
        default=0,
        type=int,
        metavar="PIXELS",
        help="pad batches, in evaluation too, to multiples of so many pixels, so that few sizes occur; 0: off",
    )
    group.add_argument("--num_workers", default=10, type=int, help="loading processes per process")
    group.add_argument("--no_pin_memory", dest="pin_memory", action="store_false", help="no page-locked batches")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what to run, where, and what to write about it."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="", help="where logs and checkpoints go; empty: nowhere")
    group.add_argument("--note", default="", help="free text kept with the options")
    group.add_argument("--device", default="cuda", help="the CPU is used when there is no GPU")
    group.add_argument("--seed", default=42, type=int, help="the number of the process is added")
    group.add_argument("--eval", action="store_true", help="evaluate once and stop")
    group.add_argument("--debug", action="store_true", help="stop every epoch and evaluation after 15 batches")
    group.add_argument("--save_results", action="store_true", help="write results-RANK.pkl in evaluation")
    group.add_argument("--save_log", action="store_true", help="metric lines also go to the log file")
    group.add_argument(
        "--log_instability",
        action="store_true",
        help="log after each epoch how many queries per validation image changed their matched object (the matching "
        "instability of the DN-DETR paper); matches the last decoder layer once more in the evaluation",
    )
    group.add_argument("--print_freq", default=10, type=int, help="steps between two readings of the meters")


def add_tracker_options(parser: argparse.ArgumentParser) -> None:
    """Add where curves and pictures of a training go besides log.txt."""
    group = parser.add_argument_group("experiment tracking")
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard files to output_dir")
    group.add_argument("--wandb_project", metavar="NAME", help="log to this Weights & Biases project")
    group.add_argument("--mlflow_experiment", metavar="NAME", help="log to this MLflow experiment")
    group.add_argument(
        "--mlflow_uri",
        metavar="URI",
        help="MLflow server or data base; left out: MLFLOW_TRACKING_URI, else mlflow.db in output_dir",
    )
    group.add_argument(
        "--log_pictures_every", default=10, type=int, help="epochs between pictures sent to the trackers; 0: none"
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add what is resumed, fine-tuned and kept."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--resume", default="", metavar="FILE|URL|auto", help="continue a run; auto: newest in output_dir"
    )
    group.add_argument("--override_resumed_lr_drop", action="store_true", help="--lr_drop replaces the restored one")
    group.add_argument("--drop_lr_now", action="store_true", help="after --resume divide every rate by ten")
    group.add_argument("--pretrain_model_path", type=str, metavar="FILE|URL", help="start from these weights only")
    group.add_argument("--finetune_ignore", type=str, nargs="+", help="parts of names left out of those weights")
    group.add_argument("--start_epoch", default=0, type=int)
    group.add_argument("--save_checkpoint_interval", default=10, type=int, help="epochs between numbered checkpoints")
    group.add_argument(
        "--checkpoint_steps", default=0, type=int, help="also save every N optimizer steps; 0: epochs only"
    )
    group.add_argument(
        "--checkpoint_minutes", default=0.0, type=float, help="also save when so much time has passed; 0: epochs only"
    )
    group.add_argument(
        "--on_save_error",
        default="stop",
        choices=("stop", "continue"),
        help="a checkpoint that cannot be written (disk full) ends the run, or is only told",
    )
    group.add_argument(
        "--keep_checkpoints", default=2, type=int, help="checkpoint.pth and its predecessors; numbered ones always stay"
    )


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of several processes."""
    group = parser.add_argument_group("processes")
    group.add_argument("--find_unused_params", action="store_true", help="passed to DistributedDataParallel")
    group.add_argument("--world_size", default=1, type=int, help="processes, or hosts when a launcher runs on each")
    group.add_argument("--dist_url", default="env://", help="rendezvous address")
    group.add_argument("--dist_timeout", default=30.0, type=float, help="minutes a process waits for the others")
    group.add_argument("--rank", default=0, type=int, help="number of this process, or host")
    group.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without ninety lines of usage."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2 and the message on stderr."""
        self.exit(2, f"{self.prog}: error: {message}\n")
