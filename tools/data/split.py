"""Divide an annotation file into parts, by picture, with about the same share of every class in each.

The division depends on --seed and the file alone. --group_by keeps pictures together whose file names agree in what a
pattern's brackets match (the whole match where it has none): frames of one video, tiles of one photograph. With
--images the pictures are copied (or linked, --link) into the layout that --coco_path reads.

Examples::

    python -m tools.dataset split labels.json --images pictures --fractions 0.8 0.2 --output data/mine --link
    python -m tools.dataset split labels.json --fractions 0.7 0.2 0.1 --output parts --group_by '^(.+)_frame'
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.annotations import DatasetError
from tools.data.layout import SplitPaths, load_content, place_picture, refuse_existing, split_paths, write_json
from util.errors import OptionError
from util.logger import format_table

HELP = "divide an annotation file into train and val"
_NAMES = ("train", "val", "test")


def divide(counts: NDArray[np.int64], sizes: NDArray[np.int64], fractions: Sequence[float], *, seed: int) -> list[int]:
    """Assign groups of pictures to parts, so that every part gets about its share of every class and of the pictures.

    As in iterative stratification (Sechidis et al., 2011, 'On the Stratification of Multi-Label Data') the rarest class
    still open is dealt out first. A group goes where it lowers the chi-square distance from the wanted numbers most,
    over all its classes, not over the rarest alone.

    Args:
        counts: (G, K) pictures of each group that show each class.
        sizes: (G,) pictures of each group.
        fractions: share of each part, sum 1.
        seed: decides between equals.

    Returns:
        The part of each group.
    """
    rng = np.random.default_rng(seed)
    # Having a picture at all is one more class.
    numbers = np.concatenate((counts, sizes[:, None]), axis=1).astype(np.float64)
    wanted = np.outer(fractions, numbers.sum(0))
    lacking = wanted.copy()
    part = np.full(len(sizes), -1)
    while (left := numbers[part < 0].sum(0)).any():
        rarest = int(np.where(left > 0, left, np.inf).argmin())
        members = rng.permutation(np.flatnonzero((part < 0) & (numbers[:, rarest] > 0)))
        # Large groups first: small ones even out what they leave.
        for group in members[np.argsort(-sizes[members], kind="stable")]:
            change = ((numbers[group] - 2 * lacking) * numbers[group] / np.maximum(wanted, 1e-9)).sum(1)
            part[group] = np.lexsort((rng.random(len(change)), change.round(9)))[0]
            lacking[part[group]] -= numbers[group]
    return part.tolist()


def group_pictures(names: Sequence[str], pattern: str | None) -> list[int]:
    """Return the number of every picture's group.

    Args:
        names: file names; pattern: regular expression, None puts every picture into a group of its own.

    Raises:
        OptionError: the pattern is none, or does not match a name.
    """
    if pattern is None:
        return list(range(len(names)))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise OptionError(f"--group_by '{pattern}' is no regular expression: {error}") from error
    matches = [compiled.search(name) for name in names]
    unmatched = [name for name, match in zip(names, matches, strict=True) if match is None]
    if unmatched:
        raise OptionError(
            f"--group_by '{pattern}' does not match {len(unmatched)} of {len(names)} file names, such as {unmatched[0]}"
        )
    keys = [match.groups() or match.group() for match in matches if match is not None]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def split_content(
    content: Mapping[str, Any], fractions: Sequence[float], *, seed: int = 0, group_by: str | None = None
) -> list[dict[str, Any]]:
    """Divide the content of an annotation file by picture.

    Args:
        content: images, annotations, categories and anything else, which every part repeats.
        fractions: share of each part, sum 1.
        seed: decides between equals; group_by: see `group_pictures`.

    Returns:
        One content per part, images and annotations in their old order.

    Raises:
        OptionError: fractions or pattern are wrong. DatasetError: a part would be empty.
    """
    if len(fractions) < 2 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise OptionError(f"--fractions are two or more numbers above 0 with the sum 1, got {fractions}")
    images = sorted(content["images"], key=lambda image: image["id"])
    groups = np.array(group_pictures([image["file_name"] for image in images], group_by))
    position = {image["id"]: place for place, image in enumerate(images)}
    column = {category["id"]: place for place, category in enumerate(content["categories"])}
    present = np.zeros((len(images), len(column)), dtype=np.int64)
    for annotation in content["annotations"]:
        present[position[annotation["image_id"]], column[annotation["category_id"]]] = 1
    counts = np.zeros((groups.max(initial=-1) + 1, len(column)), dtype=np.int64)
    np.add.at(counts, groups, present)
    part_of_group = divide(counts, np.bincount(groups, minlength=len(counts)), fractions, seed=seed)
    part_of_image = {image["id"]: part_of_group[groups[place]] for place, image in enumerate(images)}
    parts = [_take(content, part_of_image, number) for number in range(len(fractions))]
    _verify(content, parts)
    return parts


def _take(content: Mapping[str, Any], part_of_image: Mapping[int, int], number: int) -> dict[str, Any]:
    chosen = {
        "images": [image for image in content["images"] if part_of_image[image["id"]] == number],
        "annotations": [a for a in content["annotations"] if part_of_image[a["image_id"]] == number],
    }
    return {**content, **chosen}


def _verify(content: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> None:
    for key in ("images", "annotations"):
        joined = sorted(entry["id"] for part in parts for entry in part[key])
        if joined != sorted(entry["id"] for entry in content[key]):
            raise AssertionError(f"the parts' {key} are not those of the file")
    if not all(part["images"] for part in parts):
        raise DatasetError(
            f"{len(content['images'])} images leave a part without any: choose other fractions, or finer groups"
        )


def format_split(parts: Mapping[str, Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]) -> str:
    """Lay out pictures and objects per class of every part, with their shares in percent."""

    def row(title: str, numbers: Sequence[int]) -> tuple[str, ...]:
        total = max(sum(numbers), 1)
        return (title, *(f"{number} ({100 * number / total:.1f} %)" for number in numbers))

    rows = [row(key, [len(part[key]) for part in parts.values()]) for key in ("images", "annotations")]
    objects = [Counter(annotation["category_id"] for annotation in part["annotations"]) for part in parts.values()]
    rows += [row(category["name"], [count[category["id"]] for count in objects]) for category in categories]
    return format_table(("", *parts), rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `split`."""
    parser.add_argument("annotations", type=Path, metavar="ANN.json", help="a COCO annotation file")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.8, 0.2], help="share of each part (0.8 0.2)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--names", nargs="+", help="names of the parts (train val test)")
    parser.add_argument("--seed", default=0, type=int, help="another seed, another division (0)")
    parser.add_argument("--group_by", metavar="REGEX", help="keep pictures together that agree in this")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="copy the pictures into the parts too")
    parser.add_argument("--link", action="store_true", help="symbolic links to the pictures instead of copies")


def main(args: argparse.Namespace) -> int:
    """Divide, write and say what went where; return the exit status."""
    names = args.names or list(_NAMES[: len(args.fractions)])
    if len(names) != len(args.fractions) or len(set(names)) < len(names):
        raise OptionError(f"{len(args.fractions)} fractions need as many different --names, got {' '.join(names)}")
    if not args.annotations.is_file():
        raise OptionError(f"no annotation file {args.annotations}: check the path")
    if args.link and args.images is None:
        raise OptionError("--link needs --images FOLDER, where the pictures lie")
    if args.images is not None and not args.images.is_dir():
        raise OptionError(f"no image folder {args.images}: check --images")
    content = load_content(SplitPaths("all", args.annotations, args.images))
    parts = dict(
        zip(names, split_content(content, args.fractions, seed=args.seed, group_by=args.group_by), strict=True)
    )
    places = {name: split_paths(args.output, name) for name in names}
    refuse_existing([paths.annotation_file for paths in places.values()])
    for name, paths in places.items():
        if args.images is not None and paths.image_folder is not None:
            for image in parts[name]["images"]:
                place_picture(args.images / image["file_name"], paths.image_folder / image["file_name"], link=args.link)
        write_json(parts[name], paths.annotation_file)
    print(format_split(parts, content["categories"]))
    for paths in places.values():
        print(f"wrote {paths.annotation_file}")
    return 0
