"""YOLO: one text file per picture, one row per object: class, then centre and size, or a polygon, relative to it.

The source is a data.yaml, or a folder with data.yaml, or a folder with classes.txt, images/ and labels/. A row's file
lies where YOLO looks for it: the last folder `images` of the picture's path becomes `labels`. A picture without such a
file has no objects.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.data.sources import BadRow, Source, SourceImage, SourceObject, find_pictures, names_below, read_lines
from util.errors import OptionError

_SPLITS = ("train", "val", "test")
# Six digits after the point are what YOLO's own tools write.
_ROUNDING = 1e-3


def read_yolo(source: Path) -> Source:
    """Read a data set in YOLO's format.

    Args:
        source: data.yaml, or the folder.

    Raises:
        OptionError: classes or pictures cannot be found.
    """
    described = source if source.is_file() else source / "data.yaml"
    found = _from_yaml(described) if described.is_file() else _from_folder(source)
    class_names, places = found
    result = Source(class_names)
    for split, (root, pictures) in places.items():
        asked = [BadRow(path, 0, "") for path in pictures]
        images = result.add_pictures(names_below(pictures, root), asked)
        result.splits[split] = [image for image in images if image is not None]
        for image in result.splits[split]:
            _read_labels(image, result)
    if not any(result.splits.values()) and not result.bad:
        raise OptionError(f"no picture in {source}: a YOLO data set has images/train, images/val and labels/...")
    return result


def _from_yaml(path: Path) -> tuple[list[str], dict[str, tuple[Path, list[Path]]]]:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise OptionError(f"reading {path} needs PyYAML: pip install pyyaml, or write a classes.txt") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is no YAML ({str(error).splitlines()[0]}): correct it") from error
    if not isinstance(content, dict) or "names" not in content:
        raise OptionError(f"{path}: expected the keys names, train and val; add the class names")
    root = path.parent / str(content.get("path") or "")
    # The path in published files is often that of another machine.
    root = root if root.is_dir() else path.parent
    places = {}
    for split in _SPLITS:
        if content.get(split):
            entries = content[split] if isinstance(content[split], list) else [content[split]]
            folders = [_find(root, path.parent, str(entry), split, path) for entry in entries]
            places[split] = (_common_root(folders), [picture for folder in folders for picture in _listed(folder)])
    if not places:
        raise OptionError(f"{path}: none of the keys {', '.join(_SPLITS)} says where pictures lie")
    return _yaml_names(content["names"], path), places


def _yaml_names(names: Any, path: Path) -> list[str]:
    if isinstance(names, list):
        return [str(name) for name in names]
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        return [str(names[label]) for label in range(len(names))]
    raise OptionError(f"{path}: names is a list, or a table 0: name, 1: name, ... without gaps; found {names!r}")


def _find(root: Path, beside: Path, entry: str, split: str, path: Path) -> Path:
    # Some exports write ../train/images for a folder that lies beside the file.
    candidates = [root / entry, beside / entry, beside / entry.removeprefix("../")]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise OptionError(f"{path}: {split} is {entry}, but there is no {candidates[0]}: correct the path")


def _common_root(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] if folders[0].is_dir() else folders[0].parent
    parents = set.intersection(*({folder, *folder.parents} for folder in folders))
    return max(parents, key=lambda parent: len(parent.parts))


def _listed(place: Path) -> list[Path]:
    if place.is_dir():
        return find_pictures(place)
    return [place.parent / line for _, line in read_lines(place)]


def _from_folder(root: Path) -> tuple[list[str], dict[str, tuple[Path, list[Path]]]]:
    candidates = [root / "classes.txt", root / "labels" / "classes.txt", root / "obj.names"]
    names = next((path for path in candidates if path.is_file()), None)
    if names is None:
        raise OptionError(f"no data.yaml and no classes.txt in {root}: write the class names, one a line")
    class_names = [line for _, line in read_lines(names)]
    for split_folder in (lambda split: root / "images" / split, lambda split: root / split / "images"):
        places = {split: split_folder(split) for split in _SPLITS if split_folder(split).is_dir()}
        if places:
            return class_names, {split: (folder, find_pictures(folder)) for split, folder in places.items()}
    folder = root / "images" if (root / "images").is_dir() else root
    return class_names, {"train": (folder, find_pictures(folder))}


def _label_file(picture: Path) -> Path:
    parts = list(picture.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[:-1][::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(image: SourceImage, result: Source) -> None:
    file = _label_file(image.path)
    if not file.is_file():
        return
    for number, line in read_lines(file):
        found = _read_row(line.split(), image, result.class_names)
        if isinstance(found, str):
            result.bad.append(BadRow(file, number, found))
        else:
            image.objects.append(found)


def _read_row(words: Sequence[str], image: SourceImage, class_names: Sequence[str]) -> SourceObject | str:
    try:
        label, *numbers = (float(word) for word in words)
    except ValueError:
        return f"expected numbers, found '{' '.join(words[:6])}'"
    if not math.isfinite(label) or label != int(label) or not 0 <= label < len(class_names):
        return f"class {words[0]} is none of 0 to {len(class_names) - 1}"
    if not all(-_ROUNDING <= number <= 1 + _ROUNDING for number in numbers):
        return "numbers must be relative to the picture, between 0 and 1"
    if len(numbers) == 4:
        centre_x, centre_y, width, height = numbers
        left, top, polygon = centre_x - width / 2, centre_y - height / 2, []
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        left, top = min(numbers[::2]), min(numbers[1::2])
        width, height = max(numbers[::2]) - left, max(numbers[1::2]) - top
        polygon = [number * (image.height if odd % 2 else image.width) for odd, number in enumerate(numbers)]
    else:
        return f"expected class x y w h, or class and a polygon of three or more points, found {len(words)} numbers"
    if width <= 0 or height <= 0:
        return f"a box of width {width:g} and height {height:g} has no area"
    box = (left * image.width, top * image.height, width * image.width, height * image.height)
    return SourceObject(int(label), box, polygon)
