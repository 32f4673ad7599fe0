"""Data sets, transforms, loading and evaluation. Only `build_dataset` reads the options."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from .annotations import DatasetError, Target, read_categories
from .coco import CocoDetection, Transform
from .generated import ensure_generated
from .loader import build_data_loader, collate_fn, naming_dead_workers
from .samplers import EvalBatchSampler, TrainBatchSampler
from .transforms import EvalTransform, TrainTransform

__all__ = [
    "CocoDetection",
    "DatasetError",
    "EvalBatchSampler",
    "Target",
    "TrainBatchSampler",
    "build_data_loader",
    "build_dataset",
    "collate_fn",
    "get_coco_api_from_dataset",
    "naming_dead_workers",
]

# image set -> (image folder, annotation file)
_LAYOUT = {
    "train": ("train2017", "instances_train2017.json"),
    "val": ("val2017", "instances_val2017.json"),
    "test": ("test2017", "image_info_test-dev2017.json"),
}


def build_dataset(image_set: str, args: Namespace) -> CocoDetection:
    """Open a split of the data set the options name; without ``coco_path`` the generated one, written if need be.

    Every ``dataset_file`` other than ``coco_panoptic`` is read the same way: the classes come from the annotation
    files of the train and val splits, never from the name.

    Args:
        image_set: "train" (with augmentation), "val" or "test".
        args: the options.

    Raises:
        DatasetError: the data or the data options cannot be used.
    """
    if image_set not in _LAYOUT:
        raise DatasetError(f"image set is one of {', '.join(_LAYOUT)}, got '{image_set}'")
    if args.dataset_file == "coco_panoptic":
        raise DatasetError("--dataset_file coco_panoptic needs panoptic segmentation, which is not available: use coco")
    if args.coco_path:
        root = Path(args.coco_path).expanduser()
        if not root.is_dir():
            raise DatasetError(f"no folder {root}; --coco_path must hold train2017, val2017 and annotations")
    else:
        root = ensure_generated(Path(args.cache_dir).expanduser())
    image_folder, annotation_file = _LAYOUT[image_set]
    return CocoDetection(
        root / image_folder,
        root / "annotations" / annotation_file,
        transform=_build_transform(image_set, args),
        other_categories=_categories_of_other_splits(root, image_set),
        label_mapping=args.label_mapping,
        num_classes=args.num_classes,
        keep_bytes=args.cache_mode,
        skip_bad_images=args.skip_bad_images,
        remove_difficult=args.remove_difficult,
        objects_required=image_set != "test",
        image_backend=args.image_backend,
    )


def get_coco_api_from_dataset(dataset: CocoDetection) -> COCO:
    """Return the evaluator's ground truth: pycocotools' index of the data set's annotation file."""
    return dataset.coco


def _build_transform(image_set: str, args: Namespace) -> Transform:
    if image_set != "train":
        return EvalTransform(scale=args.eval_scale, max_size=args.data_aug_max_size)
    return TrainTransform(
        scales=args.data_aug_scales,
        max_size=args.data_aug_max_size,
        resize_before_crop=args.data_aug_scales2_resize,
        crop_range=args.data_aug_scales2_crop,
        fix_size=args.fix_size,
    )


def _categories_of_other_splits(root: Path, image_set: str) -> list[dict[str, Any]]:
    # A split alone may lack classes; model and checkpoints must not depend on which split was opened.
    paths = [root / "annotations" / _LAYOUT[name][1] for name in ("train", "val") if name != image_set]
    return [category for path in paths if path.is_file() for category in read_categories(path)]
