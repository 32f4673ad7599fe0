"""The embedded default data set: rendered scenes in COCO's layout, written once into a cache folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .annotations import DatasetError
from .scenes import SCENE_SIZE, SHAPE_CATEGORIES, render_scene

# In the folder's name: pictures of another version are other pictures.
GENERATED_VERSION = 8
NUM_TRAIN, NUM_VAL = 2000, 300
_SPLITS = ("train", "val")
# Image ids of the splits do not overlap.
_FIRST_IMAGE_ID = {"train": 1, "val": 100001}

_log = logging.getLogger(__name__)


def ensure_generated(cache_dir: Path, *, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> Path:
    """Return the folder of the generated data set, written first if it is not there.

    Processes that come at the same time wait for the one that writes; a writer that dies leaves nothing that could
    be taken for the data set.

    Args:
        cache_dir: folder for it, created if need be.
        num_train, num_val: pictures per split.

    Returns:
        Folder with train2017, val2017 and annotations.

    Raises:
        DatasetError: the cache folder cannot be written.
    """
    root = cache_dir / f"shapes-v{GENERATED_VERSION}-{num_train}-{num_val}"
    if root.is_dir():
        return root
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with (cache_dir / f"{root.name}.lock").open("w") as lock:
            # Released by the system when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not root.is_dir():
                _write_and_rename(root, {"train": num_train, "val": num_val})
    except OSError as error:
        raise DatasetError(
            f"cannot write the generated data set to {root} ({error.strerror or error}); "
            "choose another folder with --cache_dir, or your own data with --coco_path"
        ) from error
    return root


def _write_and_rename(root: Path, counts: dict[str, int]) -> None:
    _log.info("writing the generated data set (%d pictures) to %s, once", sum(counts.values()), root)
    unfinished = root.with_name(f"{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "annotations").mkdir(parents=True)
    for split in _SPLITS:
        _write_split(unfinished, split, counts[split])
    os.replace(unfinished, root)


def _write_split(root: Path, split: str, count: int) -> None:
    folder = root / f"{split}2017"
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        image_id = _FIRST_IMAGE_ID[split] + index
        # Each scene has its own generator: scene i is the same in a data set of any size.
        picture, objects = render_scene(np.random.default_rng([GENERATED_VERSION, _SPLITS.index(split), index]))
        name = f"{image_id:012d}.jpg"
        picture.save(folder / name, quality=92, subsampling=0)
        images.append({"id": image_id, "file_name": name, "width": SCENE_SIZE, "height": SCENE_SIZE})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    content = {
        "info": {"description": "rendered shapes", "version": str(GENERATED_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in SHAPE_CATEGORIES.items()],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
