"""Compare the two splits of a data set: leaks, ids, categories."""

from __future__ import annotations

from collections.abc import Iterator

from tools.data.check_entries import SplitContent
from tools.data.kinds import Problem


def check_splits(train: SplitContent, val: SplitContent) -> list[Problem]:
    """Return what two splits have in common and should not, and where their categories differ."""
    return [*_shared_pictures(train, val), *_shared_ids(train, val), *_compare_categories(train, val)]


def _shared_pictures(train: SplitContent, val: SplitContent) -> Iterator[Problem]:
    by_content = {picture.sha256: i for i, picture in train.pictures.items() if picture.sha256}
    by_name = {entry["file_name"]: image_id for image_id, entry in train.images.items()}
    for image_id, entry in val.images.items():
        sha256 = val.pictures[image_id].sha256 if image_id in val.pictures else ""
        if sha256 and sha256 in by_content:
            other = train.name_image(by_content[sha256])
            yield val.image_problem("split_content", image_id, f"is {other} of {train.paths.annotation_file.name}")
        elif entry["file_name"] in by_name:
            compared = "their contents differ" if sha256 else "contents are not compared"
            other = f"image {by_name[entry['file_name']]} of {train.paths.annotation_file.name}"
            yield val.image_problem("split_file_name", image_id, f"is the name of {other} too; {compared}")


def _shared_ids(train: SplitContent, val: SplitContent) -> Iterator[Problem]:
    for image_id in val.images.keys() & train.images.keys():
        detail = f"is {train.images[image_id]['file_name']} in {train.paths.annotation_file.name}"
        yield val.image_problem("split_image_id", image_id, detail)


def _compare_categories(train: SplitContent, val: SplitContent) -> Iterator[Problem]:
    id_of = {name: category_id for category_id, name in train.categories.items()}
    for category_id, name in val.categories.items():
        where, other = f"category {category_id} ({name})", train.paths.annotation_file.name
        if train.categories.get(category_id, name) != name:
            detail = f"is '{train.categories[category_id]}' in {other}"
            yield Problem("split_categories", val.file, where, detail)
        elif id_of.get(name, category_id) != category_id:
            yield Problem("split_categories", val.file, where, f"has the id {id_of[name]} in {other}")
        elif category_id not in train.categories:
            yield Problem("split_category_missing", val.file, where, f"not in {other}: nothing to learn it from")
    for category_id, name in train.categories.items():
        if category_id not in val.categories and name not in val.categories.values():
            detail = f"not in {val.paths.annotation_file.name}"
            yield Problem("split_category_missing", train.file, f"category {category_id} ({name})", detail)
