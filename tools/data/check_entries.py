"""Read an annotation file entry by entry: ids, names and references."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from tools.data.kinds import Problem
from tools.data.layout import SplitPaths
from tools.data.pictures import Picture

# LabelMap's bound: ids are rows of the classifier.
_LARGEST_LABEL = 9999
_MANY_GAPS = 4


@dataclass
class SplitContent:
    """What could be read of one split; entries that no later check could use are left out.

    Attributes:
        paths: where it lies.
        images: entries with an integer id and a file name, one per id.
        categories: id -> name; annotations: all entries that are objects, as they are.
        pictures: image id -> what its file says; empty where files are not read.
    """

    paths: SplitPaths
    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[int, Picture] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Path of the annotation file."""
        return str(self.paths.annotation_file)

    def name_image(self, image_id: Any) -> str:
        """Return an image's id and file name, for messages."""
        entry = self.images.get(image_id) if is_integer(image_id) else None
        return f"image {image_id!r}" if entry is None else f"image {image_id} ({entry['file_name']})"

    def name_annotation(self, position: int) -> str:
        """Return an annotation's id and image, for messages."""
        annotation = self.annotations[position]
        name = annotation.get("id")
        which = f"annotation {name}" if is_integer(name) else f"annotations[{position}]"
        return f"{which}, {self.name_image(annotation.get('image_id'))}"

    def annotation_problem(self, kind: str, position: int, detail: str) -> Problem:
        """Return a problem of one annotation."""
        image_id = self.annotations[position].get("image_id")
        known = image_id if is_integer(image_id) and image_id in self.images else None
        return Problem(kind, self.file, self.name_annotation(position), detail, known)

    def image_problem(self, kind: str, image_id: int, detail: str) -> Problem:
        """Return a problem of one image."""
        return Problem(kind, self.file, self.name_image(image_id), detail, image_id)


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a JSON value is a whole number, as ids must be."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_split(paths: SplitPaths) -> tuple[SplitContent, list[Problem]]:
    """Read one annotation file and check everything that needs no box and no picture."""
    content = SplitContent(paths)
    try:
        data = json.loads(paths.annotation_file.read_bytes())
    except OSError as error:
        return content, [Problem("annotation_file", content.file, "", f"cannot be read: {error.strerror}")]
    except ValueError as error:
        return content, [Problem("annotation_file", content.file, "", f"is no JSON, perhaps cut off: {error}")]
    problems: list[Problem] = []
    lists: dict[str, list[dict[str, Any]]] = {}
    for key in ("images", "annotations", "categories"):
        value = data.get(key) if isinstance(data, dict) else None
        if not isinstance(value, list) or (not value and key != "annotations"):
            found = "an empty list" if value == [] else f"{type(value).__name__}"
            problems.append(Problem("annotation_file", content.file, "", f"expected a list '{key}', found {found}"))
            value = []
        lists[key] = [entry for entry in value if isinstance(entry, dict)]
        if len(lists[key]) < len(value):
            detail = f"{len(value) - len(lists[key])} entries are no JSON objects"
            problems.append(Problem("malformed_entry", content.file, f"list '{key}'", detail))
    content.annotations = lists["annotations"]
    problems += _read_images(content, lists["images"])
    problems += _read_categories(content, lists["categories"])
    problems += _check_references(content)
    problems += _check_marks(content)
    problems += _find_unused(content)
    return content, problems


def _read_images(content: SplitContent, entries: list[dict[str, Any]]) -> Iterator[Problem]:
    first_with: dict[str, int] = {}
    for position, entry in enumerate(entries):
        image_id, name = entry.get("id"), entry.get("file_name")
        if not is_integer(image_id) or not isinstance(name, str):
            detail = f"needs an integer id and a file_name, found {image_id!r} and {name!r}"
            yield Problem("malformed_entry", content.file, f"images[{position}]", detail)
            continue
        if image_id in content.images:
            other = content.images[image_id]["file_name"]
            yield Problem("duplicate_image_id", content.file, f"image {image_id}", f"is {other} and {name}", image_id)
            continue
        content.images[image_id] = entry
        if name in first_with:
            yield content.image_problem("duplicate_file_name", image_id, f"is image {first_with[name]} too")
        first_with.setdefault(name, image_id)
        if not all(_is_size(entry.get(side)) for side in ("width", "height")):
            detail = f"width {entry.get('width')!r}, height {entry.get('height')!r}"
            yield content.image_problem("image_without_size", image_id, detail)


def _is_size(value: Any) -> TypeGuard[int]:
    return is_integer(value) and value > 0


def _read_categories(content: SplitContent, entries: list[dict[str, Any]]) -> Iterator[Problem]:
    first_with: dict[str, int] = {}
    for position, entry in enumerate(entries):
        category_id, name = entry.get("id"), entry.get("name")
        if not is_integer(category_id) or not isinstance(name, str):
            detail = f"needs an integer id and a name, found {category_id!r} and {name!r}"
            yield Problem("malformed_entry", content.file, f"categories[{position}]", detail)
            continue
        where = f"category {category_id} ({name})"
        if category_id in content.categories:
            detail = f"is '{content.categories[category_id]}' and '{name}'"
            yield Problem("duplicate_category_id", content.file, where, detail)
            continue
        content.categories[category_id] = name
        if name in first_with:
            yield Problem("duplicate_category_name", content.file, where, f"is category {first_with[name]} too")
        first_with.setdefault(name, category_id)
        if not 0 <= category_id <= _LARGEST_LABEL:
            yield Problem("category_id_range", content.file, where, f"labels are 0 to {_LARGEST_LABEL}")
        if category_id == 0:
            yield Problem("category_id_zero", content.file, where, "its label is 0")
    rows = max(content.categories, default=0) + 1
    if _MANY_GAPS * max(len(content.categories), 1) < rows <= _LARGEST_LABEL + 1:
        detail = f"{len(content.categories)} categories, ids up to {rows - 1}: {rows} rows"
        yield Problem("category_id_gaps", content.file, "list 'categories'", detail)


def _check_references(content: SplitContent) -> Iterator[Problem]:
    for position, annotation in enumerate(content.annotations):
        for key, known, what in (
            ("image_id", content.images, "image"),
            ("category_id", content.categories, "category"),
        ):
            value = annotation.get(key)
            if not is_integer(value) or value not in known:
                yield content.annotation_problem(f"unknown_{what}", position, f"{key} is {value!r}")
    ids = [annotation.get("id") for annotation in content.annotations]
    counts = Counter(value for value in ids if is_integer(value))
    for position, value in enumerate(ids):
        if not is_integer(value) or value == 0:
            yield content.annotation_problem("annotation_ids", position, f"id is {value!r}")
        elif counts[value] > 1:
            yield content.annotation_problem("annotation_ids", position, f"id occurs {counts[value]} times")


def _check_marks(content: SplitContent) -> Iterator[Problem]:
    for position, annotation in enumerate(content.annotations):
        crowd = annotation.get("iscrowd")
        if crowd not in (None, 0, 1):
            yield content.annotation_problem("malformed_entry", position, f"iscrowd is 0 or 1, found {crowd!r}")
        elif crowd == 1:
            yield content.annotation_problem("crowd", position, f"category {annotation.get('category_id')!r}")
        if annotation.get("difficult") == 1 or annotation.get("ignore") == 1:
            yield content.annotation_problem("difficult", position, f"category {annotation.get('category_id')!r}")


def _find_unused(content: SplitContent) -> Iterator[Problem]:
    objects = [annotation for annotation in content.annotations if annotation.get("iscrowd") != 1]
    used = _values(objects, "category_id")
    for category_id, name in content.categories.items():
        if category_id not in used:
            yield Problem("unused_category", content.file, f"category {category_id} ({name})", "has no object to learn")
    with_objects = _values(content.annotations, "image_id")
    for image_id in content.images:
        if image_id not in with_objects:
            yield content.image_problem("image_without_objects", image_id, "no annotation")


def _values(annotations: list[dict[str, Any]], key: str) -> set[int]:
    return {annotation[key] for annotation in annotations if is_integer(annotation.get(key))}
