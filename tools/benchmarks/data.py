"""Time the training input pipeline, from encoded files in memory to padded batches with targets, on one core.

The baseline is the pipeline of the official code: a target from annotation dicts, Pillow for every step, normalised
floats, padded. It draws the same random numbers, so both sides load the same crops at the same sizes, and targets and
pixels are compared first. ``pil`` is the default of main.py, ``torch`` is ``--image_backend torch``. Batches of bytes
are normalised on the device that trains; rows "and normalised" do that on the CPU too and count it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

import main as program
from datasets import CocoDetection, build_dataset, collate_fn
from datasets.coco import Transform
from datasets.images import decode_image
from datasets.loader import Batch, sample_randomness
from datasets.samplers import TrainBatchSampler
from util.nested_tensor import NestedTensor
from util.pixels import IMAGE_MEAN, IMAGE_STD, normalize_batch

from .compare import Ratio, add_common_arguments, compare, report

SCALES, MAX_SIZE, BEFORE_CROP, CROP = range(480, 801, 32), 1333, (400, 500, 600), (384, 600)
# What a pixel may differ by on average, in levels of 255: windows of crops lie within a pixel of each other.
PIXEL_TOLERANCE = {"pil": 0.0, "torch": 12.0}
DRAWN_SIZES = [(640, 480)] * 480 + [(480, 640)] * 160
Dicts = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    add_common_arguments(parser)
    parser.add_argument("--coco_path", required=True, help="data folder; its train split is loaded")
    parser.add_argument("--images", type=int, default=24, help="images loaded per round")
    parser.add_argument("--batch", type=int, default=2, help="images per batch")
    parser.add_argument("--padding_epochs", type=int, default=20, help="epochs over which padding is counted; 0: not")


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit code."""
    torch.set_num_threads(args.threads)
    ours = {name: open_data(args.coco_path, name) for name in ("pil", "torch")}
    indices = range(min(args.images, len(ours["pil"])))
    batches = [list(indices[start : start + args.batch]) for start in range(0, len(indices), args.batch)]
    official = OfficialPipeline(ours["pil"])
    for name, dataset in ours.items():
        assert_equal(batches, official, dataset, PIXEL_TOLERANCE[name])
    ratios = [measure(args, batches, official, ours, name, on_host) for name in ours for on_host in (False, True)]
    report(ratios, args.json)
    print(f"\nimages per second: {', '.join(rate(ratio, len(indices)) for ratio in ratios)}")
    if args.padding_epochs:
        print_padding(ours["pil"], args.batch, args.padding_epochs)
    return 0


def open_data(path: str, backend: str) -> CocoDetection:
    """Open the train split with the official augmentation; files stay in memory, so that no disk is measured."""
    options = ["-m", "dab_detr", "--coco_path", path, "--dataset_file", "benchmark", "--cache_mode"]
    return build_dataset("train", program.parse_args([*options, "--image_backend", backend]))


def measure(
    args: argparse.Namespace,
    batches: Sequence[Sequence[int]],
    official: OfficialPipeline,
    ours: dict[str, CocoDetection],
    name: str,
    on_host: bool,
) -> Ratio:
    """Compare one of our ways with the baseline."""

    def run_baseline() -> None:
        for batch in batches:
            official.load_batch(batch)

    def run_ours() -> None:
        for batch in batches:
            samples, _ = load_batch(ours[name].load, batch)
            if on_host:
                normalize_batch(samples)

    what = f"input pipeline, {sum(map(len, batches))} images, batches of {args.batch}"
    calls = {"official pipeline": run_baseline, f"{name}{', and normalised' if on_host else ''}": run_ours}
    has_target = name == "torch" and not on_host
    required, aim = (4.0, 6.0) if has_target else (None, None)
    return compare(what, calls, rounds=args.rounds, required=required, aim=aim, clock=args.clock)


def rate(ratio: Ratio, images: int) -> str:
    """Return images per second of both sides of a comparison."""
    return f"{ratio.ours} {images / ratio.ours_value:.0f} (official {images / ratio.baseline_value:.0f})"


def load_batch(load: Callable[[int], tuple[Tensor, Any]], indices: Sequence[int]) -> Batch:
    """Load and pad a batch as a loading process does, with the random numbers of epoch 0."""
    samples = []
    for index in indices:
        with sample_randomness(0, 0, index):
            samples.append(load(index))
    return collate_fn(samples)


class OfficialPipeline:
    """What the official code does for a sample, step by step, written from its definition.

    Args:
        dataset: gives encoded files and annotations.
    """

    def __init__(self, dataset: CocoDetection) -> None:
        self.files = [(dataset.folder.folder / name).read_bytes() for name in dataset.folder.names]
        self.ids, self.coco = dataset.ids, dataset.coco

    def load(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Decode, convert the annotations, augment, normalise."""
        image = decode_image(self.files[index])
        image_id = self.ids[index]
        objects = self.coco.loadAnns(self.coco.getAnnIds(imgIds=image_id))
        return self.augment(image, convert(objects, image_id, *image.size))

    def load_batch(self, indices: Sequence[int]) -> tuple[NestedTensor, list[dict[str, Any]]]:
        """Load samples and pad them: a batch of zeros into which they are copied."""
        samples = []
        for index in indices:
            with sample_randomness(0, 0, index):
                samples.append(self.load(index))
        images, targets = zip(*samples, strict=True)
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        tensors = torch.zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool)
        for position, image in enumerate(images):
            tensors[position, :, : image.shape[1], : image.shape[2]].copy_(image)
            mask[position, : image.shape[1], : image.shape[2]] = False
        return NestedTensor(tensors, mask), list(targets)

    def augment(self, image: Image.Image, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Flip; then resize, or resize, crop and resize; then to a normalised tensor."""
        if random.random() < 0.5:
            boxes = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
            target = {**target, "boxes": boxes + torch.tensor([image.width, 0, image.width, 0])}
            image = F.hflip(image)
        if random.random() < 0.5:
            image, target = resize(image, target, random.choice(SCALES), MAX_SIZE)
        else:
            image, target = resize(image, target, random.choice(BEFORE_CROP), None)
            width, height = (random.randint(CROP[0], min(side, CROP[1])) for side in image.size)
            window = T.RandomCrop.get_params(image, [height, width])
            image, target = F.crop(image, *window), crop(target, *window)
            image, target = resize(image, target, random.choice(SCALES), MAX_SIZE)
        tensor = F.normalize(F.to_tensor(image), list(IMAGE_MEAN), list(IMAGE_STD))
        x0, y0, x1, y1 = target["boxes"].unbind(-1)
        boxes = torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)
        return tensor, {**target, "boxes": boxes / torch.tensor([image.width, image.height] * 2, dtype=torch.float32)}


def convert(objects: Dicts, image_id: int, width: int, height: int) -> dict[str, Any]:
    """Turn annotation entries into a target: no crowds, boxes as corners inside the image, none without area."""
    objects = [entry for entry in objects if entry.get("iscrowd", 0) == 0]
    boxes = torch.as_tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    return {
        "boxes": boxes[keep],
        "labels": torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64)[keep],
        "image_id": torch.tensor([image_id]),
        "area": torch.tensor([entry["area"] for entry in objects])[keep],
        "iscrowd": torch.tensor([entry.get("iscrowd", 0) for entry in objects])[keep],
        "orig_size": torch.as_tensor([int(height), int(width)]),
        "size": torch.as_tensor([int(height), int(width)]),
    }


def resize(
    image: Image.Image, target: dict[str, Any], size: int, max_size: int | None
) -> tuple[Image.Image, dict[str, Any]]:
    """Make the short side `size`, the long one at most `max_size`."""
    short, long = sorted(image.size)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
    stretched = int(size * long / short)
    height, width = (stretched, size) if image.width < image.height else (size, stretched)
    if short == size:
        width, height = image.size
    resized = F.resize(image, [height, width])
    scale_x, scale_y = width / image.width, height / image.height
    boxes = target["boxes"] * torch.as_tensor([scale_x, scale_y, scale_x, scale_y])
    area = target["area"] * (scale_x * scale_y)
    return resized, {**target, "boxes": boxes, "area": area, "size": torch.tensor([height, width])}


def crop(target: dict[str, Any], top: int, left: int, height: int, width: int) -> dict[str, Any]:
    """Cut the boxes to a window; objects left without area go."""
    boxes = target["boxes"] - torch.as_tensor([left, top, left, top])
    corners = torch.min(boxes.reshape(-1, 2, 2), torch.as_tensor([width, height], dtype=torch.float32)).clamp(min=0)
    keep = torch.all(corners[:, 1, :] > corners[:, 0, :], dim=1)
    area = (corners[:, 1, :] - corners[:, 0, :]).prod(dim=1)
    changed = {"boxes": corners.reshape(-1, 4), "area": area}
    objects = {name: {**target, **changed}[name][keep] for name in ("boxes", "labels", "area", "iscrowd")}
    return {**target, **objects, "size": torch.tensor([height, width])}


def assert_equal(
    batches: Sequence[Sequence[int]], official: OfficialPipeline, dataset: CocoDetection, tolerance: float
) -> None:
    """Check that both sides load the same: masks and targets exactly, pixels within `tolerance` levels on average."""
    for batch in batches:
        expected, expected_targets = official.load_batch(batch)
        samples, targets = load_batch(dataset.load, batch)
        assert torch.equal(samples.mask, expected.mask)
        for target, expected_target in zip(targets, expected_targets, strict=True):
            for name, value in expected_target.items():
                assert torch.equal(target[name], value), (name, target[name], value)
        scale = 255 * torch.tensor(IMAGE_STD)[:, None, None]
        difference = float(((normalize_batch(samples).tensors - expected.tensors) * scale).abs().mean())
        assert difference <= tolerance, f"pixels differ by {difference:.2f} levels on average"


def print_padding(dataset: CocoDetection, batch_size: int, epochs: int) -> None:
    """Count the share of padding in training batches, with and without `--aspect_ratio_grouping`."""
    entries = [dataset.coco.imgs[image_id] for image_id in dataset.ids]
    stored = [(entry["width"], entry["height"]) for entry in entries]
    for what, sizes in (("these images", stored), ("480 of 640x480, 160 of 480x640", DRAWN_SIZES)):
        shares = [padding(sizes, dataset.transform, batch_size, epochs, grouped) for grouped in (False, True)]
        plain, grouped_share = (f"{100 * share:.1f} %" for share in shares)
        print(f"padding in batches of {batch_size}, {what}: {plain}, grouped by orientation {grouped_share}")


def padding(
    sizes: Sequence[tuple[int, int]], transform: Transform, batch_size: int, epochs: int, grouped: bool
) -> float:
    """Compute the share of padding when images of these (width, height) are augmented and batched for some epochs."""
    groups = [int(height > width) for width, height in sizes] if grouped else None
    sampler = TrainBatchSampler(len(sizes), batch_size=batch_size, groups=groups)
    used = total = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in sampler:
            drawn = []
            for index in batch:
                with sample_randomness(0, epoch, index):
                    drawn.append(transform.draw(*sizes[index]).size_hw)
            used += sum(height * width for height, width in drawn)
            total += len(drawn) * max(height for height, _ in drawn) * max(width for _, width in drawn)
    return 1 - used / total
