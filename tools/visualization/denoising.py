"""Draw what denoising does: known objects, the noised boxes fed in, and what the last decoder layer makes of them.

Example::

    python -m tools.visualize denoising outputs/demo/checkpoint.pth picture.jpg annotations.json --output denoising.png
    python -m tools.visualize denoising outputs/demo/checkpoint.pth --coco_path data/coco --image_id 139 \\
        --output denoising.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from datasets import DatasetError
from datasets.annotations import load_annotation_file
from tools.detector import Detector, load_detector
from util.box_ops import box_cxcywh_to_xyxy, elementwise_box_iou
from util.checkpoint import load_checkpoint
from util.errors import OptionError
from util.option_rules import DENOISING_OPTIONS

from .capture import DenoisingTrace, trace_denoising
from .drawing import (
    color_of,
    describe,
    draw_reference,
    make_panels,
    positive,
    prepare,
    read_picture,
    save,
    show_picture,
    write_text,
)

NO_CATEGORY = "N/A"
Entry = dict[str, Any]  # of a COCO annotation file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument("image", type=Path, nargs="?", metavar="IMAGE", help="picture to look at")
    parser.add_argument(
        "annotation", type=Path, nargs="?", metavar="ANNOTATION.json", help="COCO annotation file that lists IMAGE"
    )
    parser.add_argument("--coco_path", type=Path, metavar="FOLDER", help="data set folder, instead of the two")
    parser.add_argument("--image_id", type=int, metavar="N", help="picture of that data set")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="split of that data set")
    parser.add_argument("--groups", type=positive, default=3, help="draw so many denoising groups at most")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")


def run(options: argparse.Namespace, model_options: Sequence[str]) -> None:
    """Draw what the command line asks for."""
    path, annotations, categories = find_picture(options)
    noise = [] if "--config_file" in model_options else stored_noise(options.checkpoint)
    detector = load_detector(options.checkpoint, options=[*noise, *model_options])
    draw_denoising(
        detector,
        read_picture(path),
        to_labels(annotations, categories, detector),
        options.output,
        groups=options.groups,
        seed=options.seed,
    )


def stored_noise(checkpoint: str) -> list[str]:
    """Return the noise a run was trained with as a command line; nothing where its file does not tell."""
    if Path(checkpoint).is_dir() or Path(checkpoint).suffix == ".safetensors":
        return []
    content = load_checkpoint(checkpoint)
    stored = content.get("options") or vars(content.get("args", argparse.Namespace()))
    if not stored.get("use_dn"):
        return []
    arguments = []
    for name in DENOISING_OPTIONS:
        value = stored.get(name)
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments += [f"--{name}", str(value)]
    return arguments


def find_picture(options: argparse.Namespace) -> tuple[Path, list[Entry], list[Entry]]:
    """Return a picture's file, its annotations and all categories, from either way of naming it.

    Raises:
        OptionError: neither or both ways are used. DatasetError: the picture is not listed.
    """
    ways = (options.image, options.annotation), (options.coco_path, options.image_id)
    complete = [None not in way for way in ways]
    if sum(complete) != 1 or complete != [any(part is not None for part in way) for way in ways]:
        raise OptionError("expected IMAGE and ANNOTATION.json, or --coco_path and --image_id")
    if complete[0]:
        content = load_annotation_file(options.annotation)
        found = [image for image in content["images"] if Path(image["file_name"]).name == options.image.name]
        path, wanted = options.image, options.image.name
    else:
        folder = f"{options.split}2017"
        content = load_annotation_file(options.coco_path / "annotations" / f"instances_{folder}.json")
        found = [image for image in content["images"] if image["id"] == options.image_id]
        path, wanted = options.coco_path / folder, f"image {options.image_id}"
    if not found:
        raise DatasetError(f"{wanted} is not listed in the annotation file")
    if path is not options.image:
        path = path / found[0]["file_name"]
    annotations = [a for a in content["annotations"] if a["image_id"] == found[0]["id"]]
    return path, annotations, content["categories"]


def to_labels(annotations: Sequence[Entry], categories: Sequence[Entry], detector: Detector) -> list[Entry]:
    """Return the annotations with the detector's labels in place of category ids.

    A detector that does not know its category ids is asked for the categories' names.

    Args:
        annotations, categories: of a COCO annotation file.

    Raises:
        DatasetError: a category is none of the detector's.
    """
    if detector.category_ids is not None:
        label_of = {category: label for label, category in enumerate(detector.category_ids)}
    else:
        names = {name: label for label, name in enumerate(detector.class_names) if name != NO_CATEGORY}
        label_of = {c["id"]: names[c["name"]] for c in categories if c["name"] in names}
    for annotation in annotations:
        if annotation["category_id"] not in label_of:
            name = next(c["name"] for c in categories if c["id"] == annotation["category_id"])
            known = ", ".join(name for name in detector.class_names if name != NO_CATEGORY)
            raise DatasetError(f"category '{name}' is none of the detector's classes: {known}")
    return [a | {"category_id": label_of[a["category_id"]]} for a in annotations]


def draw_denoising(
    detector: Detector,
    picture: Image.Image,
    annotations: Sequence[Entry],
    out_path: Path,
    *,
    groups: int = 3,
    seed: int = 0,
) -> DenoisingTrace:
    """Draw known objects in the first column and a denoising group in each other, noised above denoised.

    Negatives of contrastive pairs have rows of their own below.

    Args:
        picture: RGB; annotations: COCO's entries, `category_id` a label; out_path: PNG or SVG.
        groups: most groups drawn; seed: of the noise.

    Returns:
        What was drawn, all groups.

    Raises:
        OptionError: the detector has no denoising, or the picture no object.
    """
    if getattr(detector.model, "denoising", None) is None:
        raise OptionError("the detector was not trained with denoising (--use_dn): there is nothing to draw")
    image, target = prepare(detector, picture, annotations)
    if not len(target["labels"]):
        raise OptionError("the picture has no known object: choose another one")
    trace = trace_denoising(detector.model, image, target, seed=seed)
    names = detector.class_names
    labels, boxes = target["labels"].cpu(), target["boxes"].cpu()
    columns = min(groups, int(trace.group.max()) + 1)
    kinds = (False, True) if trace.negative.any() else (False,)
    figure, axes = make_panels(2 * len(kinds), columns + 1, picture)
    _draw_known(axes[0, 0], picture, labels, boxes, names)
    for axis in axes[1:, 0]:
        axis.set_axis_off()
    for row, (negative, denoised) in enumerate((n, d) for n in kinds for d in (False, True)):
        part = trace.negative == negative
        shown = trace.boxes if denoised else trace.noised_boxes
        overlap = _mean_iou(shown[part], boxes[trace.known[part]])
        kind = ("negatives" if negative else "positives") if len(kinds) > 1 else "boxes"
        axes[row, 1].set_ylabel(f"{'denoised' if denoised else 'noised'} {kind}\nmean IoU {overlap:.2f}")
        for group in range(columns):
            axis = axes[row, group + 1]
            show_picture(axis, picture)
            if row == 0:
                axis.set_title(f"group {group + 1}")
            queries = (part & (trace.group == group)).nonzero().flatten().tolist()
            _draw_queries(axis, picture, trace, queries, labels, boxes, names, denoised=denoised)
    save(figure, out_path)
    return trace


def _draw_queries(
    axis: Axes,
    picture: Image.Image,
    trace: DenoisingTrace,
    queries: Sequence[int],
    labels: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    *,
    denoised: bool,
) -> None:
    """Draw queries of the denoising part as fed in, or as answered, over their true boxes."""
    for query in queries:
        known = int(trace.known[query])
        color = color_of(known)
        # Dots of both, to be seen on light and dark pictures.
        draw_reference(axis, boxes[known], picture, "white", width=1.2)
        draw_reference(axis, boxes[known], picture, "black", style=":", width=1.2)
        box = (trace.boxes if denoised else trace.noised_boxes)[query]
        place = draw_reference(axis, box, picture, color, style="--" if trace.negative[query] else "-")
        if denoised:
            text = describe(trace.probabilities[query], names)
        else:
            text = _input_label(int(trace.noised_labels[query]), int(labels[known]), names)
        write_text(axis, place, text, color, picture)


def _input_label(noised: int, true: int, names: Sequence[str]) -> str:
    """Return the name of the label fed in, with the true one before it where the noise replaced it."""
    if noised == len(names):
        return "no object"
    # The noise draws from all labels, those without a category too.
    name = f"label {noised}" if names[noised] == NO_CATEGORY else names[noised]
    return name if noised == true else f"{names[true]} → {name}"


def _draw_known(axis: Axes, picture: Image.Image, labels: Tensor, boxes: Tensor, names: Sequence[str]) -> None:
    show_picture(axis, picture)
    axis.set_title("known objects")
    for number, (label, box) in enumerate(zip(labels.tolist(), boxes, strict=True)):
        place = draw_reference(axis, box, picture, color_of(number))
        write_text(axis, place, names[label], color_of(number), picture)


def _mean_iou(boxes: Tensor, known: Tensor) -> float:
    overlap, _ = elementwise_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(known))
    return overlap.mean().item()
