"""Time the inference of our detectors against those of Hugging Face transformers, with the same random weights.

Configuration and weights of a transformers model are converted as a checkpoint would be; the outputs of both are
compared before anything is timed. Then all variants take turns in one process. transformers has to be installed for
this measurement only.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import main as program
from models import build_model
from models.inference import prepare_for_inference
from tools.conversion import hugging_face
from util.nested_tensor import NestedTensor

from .compare import CLOCKS, Ratio, add_common_arguments, ratio_of, report
from .ops import interleave

CLASSES = {"deformable_detr": "DeformableDetr", "dab_detr": "DabDetr"}
SIZES = {"deformable_detr": [(800, 1066)], "dab_detr": [(480, 640), (800, 1066)]}
LABELS = 91
# (model, our type) -> ratio to transformers in float32 that is required, and aimed at.
TARGETS = {
    ("deformable_detr", "float32"): (2.5, 4.0),
    ("deformable_detr", "bfloat16"): (4.5, 8.0),
    ("dab_detr", "float32"): (1.4, 2.2),
    ("dab_detr", "bfloat16"): (3.0, 4.0),
}
# Two orders of float32 sums through some hundred layers; between bfloat16 and float32 the mean must stay this near.
LOGIT_TOLERANCE, BOX_TOLERANCE = 1e-3, 1e-4
LOGIT_DRIFT, BOX_DRIFT = 0.2, 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the one image; default: 800 x 1066, and 480 "
        "x 640 for dab_detr too"
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="measure our compiled detectors too")
    add_common_arguments(parser)


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Compare, measure, print the table, and return the exit code; `arguments` are what `args` was parsed from."""
    try:
        importlib.import_module("transformers")
    except ImportError:
        print("expected Hugging Face transformers to compare with, it is not installed: pip install transformers")
        return 1
    torch.set_num_threads(args.threads)
    ratios: list[Ratio] = []
    for name in args.models:
        theirs, ours = build_pair(name)
        for size in [tuple(args.size)] if args.size else SIZES[name]:
            ratios += measure(name, theirs, ours, size, args)
    report(ratios, args.json)
    return 0


def build_pair(name: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return a random transformers model and ours with the same weights, both for inference.

    Args:
        name: key of `CLASSES`.
        settings: of the transformers configuration, instead of the published ones.
    """
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{CLASSES[name]}Config")(
        **{"backbone": "resnet50", "num_labels": LABELS, "auxiliary_loss": False, **settings}
    )
    theirs = getattr(transformers, f"{CLASSES[name]}ForObjectDetection")(config).eval().requires_grad_(False)
    spread(theirs)
    described = config.to_dict()
    options = program.parse_args(["-m", name, "--backbone_weights", "none", "--lr_backbone", "0", "--no_aux_loss"])
    options = argparse.Namespace(**{**vars(options), **hugging_face.options_of(described)})
    options.num_classes = config.num_labels
    ours = build_model(options)[0]
    weights = hugging_face.convert(theirs.state_dict(), described["model_type"])
    ours.load_state_dict(hugging_face.fill_tied_heads(weights, ours.state_dict()), strict=True)
    return theirs, ours.eval().requires_grad_(False)


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give a new model weights that let inputs show in outputs, in place.

    Matrices that start at zero become random, and batch norms get the statistics of a noise image.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)

    def calibrate(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        norm.running_var.copy_(inputs[0].var((0, 2, 3), unbiased=False))
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.weight.fill_(0.5)  # below 1, or the sum over residual blocks would grow

    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    model(pixel_values=torch.randn(1, 3, 128, 128))
    for handle in handles:
        handle.remove()


def measure(
    name: str, theirs: nn.Module, ours: nn.Module, size: tuple[int, int], args: argparse.Namespace
) -> list[Ratio]:
    """Compare the outputs for one image of a size, then time all variants in turn."""
    images = torch.randn(1, 3, *size)
    batch = NestedTensor(images, torch.zeros((1, *size), dtype=torch.bool), padded=False)
    calls: dict[str, Callable[[], Any]] = {"transformers float32": partial(theirs, pixel_values=images)}
    for dtype, compiled in product(args.dtypes, (False, True) if args.compile else (False,)):
        ready = prepare_for_inference(ours, getattr(torch, dtype), compile=compiled)
        calls[f"ours {dtype}{', compiled' if compiled else ''}"] = partial(ready, batch)
    if "bfloat16" in args.dtypes:
        calls["transformers bfloat16"] = partial(autocast_call, theirs, images)
    what = f"{name} R50 {size[0]} x {size[1]}"
    with torch.inference_mode():
        calls = check(what, calls)
        seconds = interleave(calls, args.rounds, torch.device("cpu"), CLOCKS[args.clock])
    ratios = []
    for mine in [side for side in calls if side.startswith("ours")]:
        dtype = mine.split()[1].rstrip(",")
        required, aim = TARGETS[name, dtype]
        sides = {"ours": mine, "baseline": "transformers float32"}
        ratios.append(ratio_of(what, seconds, **sides, required=required, aim=aim))
        if dtype != "float32" and f"transformers {dtype}" in calls:
            ratios.append(ratio_of(what, seconds, ours=mine, baseline=f"transformers {dtype}"))
    return ratios


def autocast_call(model: nn.Module, images: Tensor) -> Any:
    """Run a transformers model in bfloat16, by autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(pixel_values=images)


def check(what: str, calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Compare the outputs of all variants with those of transformers in float32.

    Returns:
        the variants that run: transformers need not support bfloat16.

    Raises:
        AssertionError: the results differ by more than the tolerances.
    """
    logits, boxes = predictions(calls["transformers float32"]())
    kept = {"transformers float32": calls["transformers float32"]}
    for name, call in list(calls.items())[1:]:
        try:
            own_logits, own_boxes = predictions(call())
        except RuntimeError as error:
            if name.startswith("ours"):
                raise
            print(f"{what}: {name} does not run: {str(error).splitlines()[0]}")
            continue
        kept[name] = call
        off_logits, off_boxes = (own_logits - logits).abs(), (own_boxes - boxes).abs()
        print(
            f"{what}: {name} against transformers float32: logits (spread {logits.std():.2g}) off by at most "
            f"{off_logits.max():.2g}, {off_logits.mean():.2g} in the mean; boxes by {off_boxes.max():.2g}, "
            f"{off_boxes.mean():.2g}"
        )
        if "float32" in name:
            assert off_logits.max() < LOGIT_TOLERANCE and off_boxes.max() < BOX_TOLERANCE, "results differ"
        elif name.startswith("ours"):
            assert off_logits.mean() < LOGIT_DRIFT and off_boxes.mean() < BOX_DRIFT, "bfloat16 is too far off"
    return kept


def predictions(outputs: Any) -> tuple[Tensor, Tensor]:
    """Return logits and boxes of our outputs or those of transformers, as float32."""
    ours = isinstance(outputs, dict) and "pred_logits" in outputs
    logits, boxes = (outputs["pred_logits"], outputs["pred_boxes"]) if ours else (outputs.logits, outputs.pred_boxes)
    return logits.float(), boxes.float()
