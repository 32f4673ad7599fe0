"""Small data sets on disk and options for the tests of datasets."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """Return the folder of a real data set; the calling test is skipped where it is absent."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"data set {name} is not here")
    return folder


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Return the content of the file that Pillow would write."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def options(**changes: Any) -> Namespace:
    """Return the data options with their defaults, some changed."""
    defaults = {
        "coco_path": None,
        "dataset_file": "coco",
        "cache_dir": "~/.cache/dn_detr",
        "label_mapping": "ids",
        "num_classes": None,
        "cache_mode": False,
        "skip_bad_images": False,
        "remove_difficult": False,
        "fix_size": False,
        "image_backend": "pil",
        "eval_scale": 800,
        "data_aug_scales": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        "data_aug_max_size": 1333,
        "data_aug_scales2_resize": [400, 500, 600],
        "data_aug_scales2_crop": [384, 600],
    }
    return Namespace(**{**defaults, **changes})


def small_options(root: Path, **changes: Any) -> Namespace:
    """Return options that read ``root`` and make pictures of about 32 pixels."""
    small = {
        "coco_path": str(root),
        "eval_scale": 32,
        "data_aug_scales": [24, 32],
        "data_aug_max_size": 48,
        "data_aug_scales2_resize": [28, 36],
        "data_aug_scales2_crop": [16, 24],
    }
    return options(**{**small, **changes})


def annotation(number: int, image_id: int, category_id: int = 1, **changes: Any) -> dict[str, Any]:
    """Return one annotation entry with a box well inside a 40 x 30 picture."""
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": [2 + number, 3, 10, 12]}
    return {**entry, "area": 100.0, "iscrowd": 0, **changes}


def instances(num_images: int = 4, first_id: int = 1) -> dict[str, Any]:
    """Return the content of an annotation file: two objects per picture, category ids 1, 3 and 7."""
    ids = range(first_id, first_id + num_images)
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in ids],
        "annotations": [
            annotation(2 * k + j + 1, i, (1, 3, 7)[(k + j) % 3], bbox=[2 + k, 3, 10, 12])
            for k, i in enumerate(ids)
            for j in range(2)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 3, "name": "cow"}],
    }


def write_split(root: Path, split: str, content: Any, *, pictures: bool = True) -> Path:
    """Write one split of a data set: annotation file and noise pictures; returns the annotation file's path."""
    folder, file = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    if pictures and isinstance(content, dict):
        for image in content["images"]:
            noise = np.random.RandomState(image["id"]).randint(0, 256, size=(image["height"], image["width"], 3))
            Image.fromarray(noise.astype(np.uint8)).save(folder / image["file_name"])
    return file


def write_data_set(root: Path, *, num_train: int = 4, num_val: int = 3) -> Path:
    """Write both splits; returns ``root``."""
    write_split(root, "train", instances(num_train))
    write_split(root, "val", instances(num_val, first_id=101))
    return root
