"""COCO annotation files: reading with every complaint in one sentence, and the objects of an image as tensors."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Target = dict[str, Tensor]
# A target before it becomes one: numpy computes with a handful of numbers several times faster than torch.
Arrays = dict[str, NDArray[Any]]

_log = logging.getLogger(__name__)


class DatasetError(ValueError):
    """The data cannot be used as it is: a folder, file, picture, annotation or data option is wrong."""


class ObjectTable(NamedTuple):
    """Annotated objects as columns, one row per object. Plain arrays, so that worker processes share their memory.

    Attributes:
        boxes_xywh: (T, 4) float32, left, top, width, height in pixels.
        categories: (T,) int64 category ids (or labels, after mapping).
        area: (T,) float32 as annotated, in square pixels.
        iscrowd: (T,) int64, 1 = region of many objects.
    """

    boxes_xywh: NDArray[np.float32]
    categories: NDArray[np.int64]
    area: NDArray[np.float32]
    iscrowd: NDArray[np.int64]

    def rows(self, index: Any) -> ObjectTable:
        """Select rows by slice, mask or positions."""
        return ObjectTable(*(column[index] for column in self))


def read_objects(annotations: Sequence[Mapping[str, Any]]) -> ObjectTable:
    """Turn annotation entries into columns; a missing area is width x height, a missing iscrowd is 0."""
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    area = [a["area"] if "area" in a else a["bbox"][2] * a["bbox"][3] for a in annotations]
    return ObjectTable(
        boxes.astype(np.float32),
        np.array([a["category_id"] for a in annotations], dtype=np.int64),
        np.array(area, dtype=np.float32),
        np.array([a.get("iscrowd", 0) for a in annotations], dtype=np.int64),
    )


def clip_boxes(boxes_xywh: NDArray[np.float32], width: Any, height: Any) -> NDArray[np.float32]:
    """Turn (N, 4) left-top-width-height boxes into corner boxes inside the image.

    Args:
        boxes_xywh: (N, 4) pixels.
        width, height: image size, a number or (N,) numbers.
    """
    boxes_xyxy = boxes_xywh.copy()
    boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
    limit = np.array([width, height, width, height], dtype=np.float32)
    return np.minimum(np.maximum(boxes_xyxy, 0), limit.T)


def has_area(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which (N, 4) corner boxes have a positive width and height, (N,) bool."""
    return (boxes_xyxy[:, 2] > boxes_xyxy[:, 0]) & (boxes_xyxy[:, 3] > boxes_xyxy[:, 1])


def make_target(objects: ObjectTable, *, image_id: int, width: int, height: int) -> Target:
    """Build the training target of one image, as official: no crowd regions, no boxes without area inside the image.

    Args:
        objects: objects of this image; ``categories`` become the labels.
        image_id: id in the annotation file.
        width, height: size of the picture in pixels.

    Returns:
        ``boxes`` (N, 4) float32 xyxy in pixels, ``labels`` (N,) int64, ``area`` (N,) float32, ``iscrowd`` (N,),
        ``image_id`` (1,), ``orig_size`` and ``size`` (2,) as height, width.
    """
    return to_tensors(make_arrays(objects, image_id=image_id, width=width, height=height))


def make_arrays(objects: ObjectTable, *, image_id: int, width: int, height: int) -> Arrays:
    """Build what `make_target` does, as arrays of its own."""
    boxes_xyxy = clip_boxes(objects.boxes_xywh, width, height)
    is_single = objects.iscrowd == 0
    keep = is_single & has_area(boxes_xyxy)
    # Kept for parity: without any object left in the file's list the official iscrowd is an empty float tensor.
    crowd_dtype = np.int64 if is_single.any() else np.float32
    return {
        "boxes": boxes_xyxy[keep],
        "labels": objects.categories[keep],
        "image_id": np.array([image_id]),
        "area": objects.area[keep],
        "iscrowd": objects.iscrowd[keep].astype(crowd_dtype, copy=False),
        "orig_size": np.array([height, width]),
        "size": np.array([height, width]),
    }


def to_tensors(arrays: Arrays) -> Target:
    """Turn a target's arrays into tensors that share their memory."""
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def to_arrays(target: Target) -> Arrays:
    """Turn a target's tensors into arrays that share their memory."""
    return {name: values.numpy() for name, values in target.items()}


def load_annotation_file(path: Path, *, objects_required: bool = True) -> dict[str, Any]:
    """Read a COCO ``instances`` file and check what everything later relies on.

    Missing ``area`` and ``iscrowd`` are filled in. Annotation ids that are missing, repeated or 0 (which pycocotools
    takes for "no match") are renumbered with a warning, because only the evaluator uses them.

    Args:
        path: the JSON file.
        objects_required: False for files that list images only (test sets).

    Returns:
        Its content, with the lists ``images``, ``annotations`` and ``categories``.

    Raises:
        DatasetError: the file is missing, is no JSON, or an entry is malformed or refers to something unknown.
    """
    data = _parse(_read_bytes(path), path)
    if not objects_required:
        data.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list) or not all(isinstance(entry, dict) for entry in data[key]):
            raise DatasetError(
                f"{path}: expected a COCO annotation file with a list '{key}' of objects; "
                "write the annotations in COCO's instances format"
            )
    image_ids = _unique_ids(data["images"], path, "image")
    _check_fields(data["images"], path, "image", {"file_name": str})
    category_ids = _unique_ids(data["categories"], path, "category")
    _check_fields(data["categories"], path, "category", {"name": str})
    _check_annotations(data["annotations"], path, image_ids, category_ids)
    _complete_annotations(data["annotations"], path)
    return data


def read_categories(path: Path) -> list[dict[str, Any]]:
    """Read only the category list of an annotation file, without parsing the rest where that is possible.

    Raises:
        DatasetError: the file is missing, or has no category list that can be read.
    """
    content = _read_bytes(path)
    # COCO's training file has 450 MB: parsing it for 80 names would add seconds and gigabytes to every evaluation.
    places = list(re.finditer(rb'"categories"\s*:\s*(?=\[)', content))
    try:
        if len(places) == 1:
            categories = json.JSONDecoder().raw_decode(content[places[0].end() :].decode())[0]
        else:
            categories = _parse(content, path).get("categories")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path}: the list 'categories' is no JSON ({error}); fetch or write the file again"
        ) from error
    if not isinstance(categories, list) or not categories:
        raise DatasetError(f"{path}: expected a list 'categories' with id and name of every class, found none")
    _unique_ids(categories, path, "category")
    _check_fields(categories, path, "category", {"name": str})
    return categories


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise DatasetError(f"no annotation file {path}; --coco_path must hold annotations/{path.name}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read {path} ({error.strerror}); check its permissions") from error


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no JSON ({error}); it may be truncated, fetch or write it again") from error
    if not isinstance(data, dict):
        raise DatasetError(f"{path}: expected a JSON object with images, annotations and categories, got a list")
    return data


def _unique_ids(entries: Iterable[Mapping[str, Any]], path: Path, what: str) -> NDArray[np.int64]:
    ids = [entry.get("id") if isinstance(entry, Mapping) else None for entry in entries]
    wrong = next((value for value in ids if not _is_integer(value)), 0)
    if wrong != 0:
        raise DatasetError(f"{path}: every {what} needs an integer 'id', found {wrong!r}; number them")
    array = np.array(ids, dtype=np.int64)
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        raise DatasetError(
            f"{path}: {what} id {values[counts > 1][0]} occurs {counts[counts > 1][0]} times; "
            f"give every {what} an id of its own"
        )
    return values


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_fields(entries: Iterable[Mapping[str, Any]], path: Path, what: str, fields: Mapping[str, type]) -> None:
    for entry in entries:
        for field, kind in fields.items():
            if not isinstance(entry.get(field), kind):
                raise DatasetError(f"{path}: {what} {entry['id']} needs a '{field}', found {entry.get(field)!r}")


def _check_annotations(
    annotations: Sequence[Mapping[str, Any]],
    path: Path,
    image_ids: NDArray[np.int64],
    category_ids: NDArray[np.int64],
) -> None:
    for position, annotation in enumerate(annotations):
        if not _is_box(annotation.get("bbox")):
            raise DatasetError(
                f"{path}: annotation {annotation.get('id', f'number {position}')} needs a 'bbox' of four finite "
                f"numbers (left, top, width, height), found {annotation.get('bbox')!r}"
            )
    for field, known, what in (("image_id", image_ids, "image"), ("category_id", category_ids, "category")):
        values = [annotation.get(field) for annotation in annotations]
        unknown = ~np.isin(np.array([v if _is_integer(v) else np.iinfo(np.int64).min for v in values]), known)
        if unknown.any():
            first = int(unknown.argmax())
            raise DatasetError(
                f"{path}: annotation {annotations[first].get('id', f'number {first}')} belongs to {what} "
                f"{values[first]!r}, which the file does not list ({int(unknown.sum())} such annotations); "
                f"add the {what} or remove them"
            )


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) and math.isfinite(number) for number in value)
    )


def _complete_annotations(annotations: Sequence[dict[str, Any]], path: Path) -> None:
    for annotation in annotations:
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if annotation.get("iscrowd") is None:
            annotation["iscrowd"] = 0
    ids = [annotation.get("id") for annotation in annotations]
    if any(not _is_integer(value) or value == 0 for value in ids) or len(set(ids)) < len(ids):
        _log.warning("%s: annotation ids are missing, repeated or 0; they are numbered 1 to %d", path, len(ids))
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
