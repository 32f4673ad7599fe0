"""Where a data set's parts lie: the layout that `--coco_path` of main.py expects."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets.annotations import DatasetError, load_annotation_file
from util.errors import OptionError

TRAINING_SPLITS = ("train", "val")


class SplitPaths(NamedTuple):
    """One split of a data set on disk.

    Attributes:
        name: "train", "val", or the stem of a file given by itself.
        annotation_file: COCO instances file.
        image_folder: where its pictures lie, None where nobody said.
    """

    name: str
    annotation_file: Path
    image_folder: Path | None


def split_paths(root: Path, name: str) -> SplitPaths:
    """Return where main.py looks for a split."""
    return SplitPaths(name, root / "annotations" / f"instances_{name}2017.json", root / f"{name}2017")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name one annotation file, or a whole data set."""
    parser.add_argument("annotations", nargs="?", type=Path, metavar="ANN.json", help="a COCO annotation file")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of its pictures")
    parser.add_argument("--coco_path", type=Path, metavar="DIR", help="instead: train and val in COCO's layout")


def chosen_splits(args: argparse.Namespace) -> list[SplitPaths]:
    """Return the splits named by `add_source_arguments`' options.

    Raises:
        OptionError: none or both ways were used, or a folder is missing.
    """
    if (args.annotations is None) == (args.coco_path is None):
        raise OptionError("pass either an annotation file (with --images FOLDER) or --coco_path DIR")
    if args.coco_path is not None:
        if args.images is not None:
            raise OptionError("--images belongs to a single annotation file; --coco_path knows its own folders")
        if not args.coco_path.is_dir():
            raise OptionError(f"no folder {args.coco_path}: --coco_path must hold train2017, val2017 and annotations")
        return [split_paths(args.coco_path, name) for name in TRAINING_SPLITS]
    if not args.annotations.is_file():
        raise OptionError(f"no annotation file {args.annotations}: check the path")
    if args.images is not None and not args.images.is_dir():
        raise OptionError(f"no image folder {args.images}: check --images")
    return [SplitPaths(args.annotations.stem, args.annotations, args.images)]


def load_content(paths: SplitPaths) -> dict[str, Any]:
    """Read an annotation file the way training does.

    Raises:
        DatasetError: it is broken; `check` lists everything that is.
    """
    try:
        return load_annotation_file(paths.annotation_file)
    except DatasetError as error:
        raise DatasetError(f"{error} (`python -m tools.dataset check` lists all problems)") from error


def place_picture(source: Path, target: Path, *, link: bool) -> None:
    """Copy a picture, or make a symbolic link to it; folders on the way are made.

    Raises:
        DatasetError: the picture is missing, or the target exists or cannot be written.
    """
    if not source.is_file():
        raise DatasetError(f"no picture {source}: complete the folder, or remove the image from the annotations")
    if target.exists() or target.is_symlink():
        raise DatasetError(f"{target} exists: choose another --output, or remove what is there")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise DatasetError(f"cannot write {target} ({error.strerror}): choose another --output") from error


def write_json(content: Mapping[str, Any] | Sequence[Any], path: Path) -> None:
    """Write JSON and make the folders on the way.

    Raises:
        OptionError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {path} ({error.strerror}): choose another place") from error


def refuse_existing(paths: Sequence[Path]) -> None:
    """Make sure that nothing is overwritten.

    Raises:
        OptionError: one of the files exists.
    """
    for path in paths:
        if path.exists():
            raise OptionError(f"{path} exists: choose another --output, or remove what is there")
