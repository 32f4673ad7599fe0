"""What is read from another format before it becomes COCO's: pictures, their objects, and rows that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from datasets.annotations import DatasetError
from tools.data.pictures import Picture, is_picture, read_pictures


class BadRow(NamedTuple):
    """A row that cannot be converted.

    Attributes:
        file: where it stands; line: from 1, 0 where the whole file is meant.
        fault: what is wrong.
    """

    file: Path
    line: int
    fault: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.fault}"


@dataclass
class SourceObject:
    """One object.

    Attributes:
        label: position in the list of class names.
        box_xywh: left, top, width, height in pixels.
        polygon: x, y, x, y, ... in pixels, empty where the source has a box only.
        is_difficult: marked so in the source.
    """

    label: int
    box_xywh: tuple[float, float, float, float]
    polygon: list[float] = field(default_factory=list)
    is_difficult: bool = False

    @property
    def area(self) -> float:
        """Square pixels of the polygon, or of the box where there is none."""
        if not self.polygon:
            return self.box_xywh[2] * self.box_xywh[3]
        xs, ys = self.polygon[::2], self.polygon[1::2]
        following = zip(xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
        return abs(sum(x * y2 - x2 * y for x, y, (x2, y2) in zip(xs, ys, following, strict=True))) / 2


@dataclass
class SourceImage:
    """One picture.

    Attributes:
        path: its file; name: what the COCO file calls it.
        width, height: pixels as stored.
        objects: on it.
    """

    path: Path
    name: str
    width: int
    height: int
    objects: list[SourceObject] = field(default_factory=list)


@dataclass
class Source:
    """A data set of another format.

    Attributes:
        class_names: of every label.
        splits: "train", "val", ... -> pictures.
        bad: rows left out.
    """

    class_names: list[str]
    splits: dict[str, list[SourceImage]] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)

    def add_pictures(self, files: Sequence[tuple[Path, str]], asked_by: Sequence[BadRow]) -> list[SourceImage | None]:
        """Read the sizes of pictures; what cannot be read becomes a bad row.

        Args:
            files: path and name of each.
            asked_by: for each the place that names it; its fault is replaced.

        Returns:
            One entry per file, None where it cannot be used.
        """
        pictures = read_pictures([path for path, _ in files], hashed=False)
        images: list[SourceImage | None] = []
        for (path, name), place, picture in zip(files, asked_by, pictures, strict=True):
            if picture.fault:
                named = picture.fault if place.file == path else f"picture {path}: {picture.fault}"
                self.bad.append(place._replace(fault=named))
            images.append(None if picture.fault else SourceImage(path, name, picture.width, picture.height))
        return images


def corner_box(corners: Sequence[str], *, origin: int, size: Picture | SourceImage) -> tuple[float, ...] | str:
    """Turn left, top, right, bottom as text into left, top, width, height in pixels.

    Args:
        corners: four numbers.
        origin: 0 = edges in pixels from the picture's corner; 1 = the first and the last pixel of the object, counted
            from 1, so that both belong to it (Pascal VOC).
        size: the picture.

    Returns:
        The box, or what is wrong with it.
    """
    try:
        left, top, right, bottom = (float(corner) for corner in corners)
    except (TypeError, ValueError):
        return f"expected the numbers xmin, ymin, xmax, ymax, found {', '.join(map(str, corners))}"
    if not all(math.isfinite(value) for value in (left, top, right, bottom)):
        return f"corners must be finite, found {', '.join(corners)}"
    left, top = left - origin, top - origin
    if right <= left or bottom <= top:
        return f"the box {', '.join(corners)} has no area: xmax must be above xmin and ymax above ymin"
    if right <= 0 or bottom <= 0 or left >= size.width or top >= size.height:
        return f"the box {', '.join(corners)} lies outside the picture of {size.width} x {size.height}"
    return left, top, right - left, bottom - top


def find_pictures(folder: Path) -> list[Path]:
    """Return all pictures in a folder and its subfolders, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and is_picture(path))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that hold anything, with their numbers from 1.

    Raises:
        DatasetError: the file cannot be read, or is no UTF-8.
    """
    try:
        # utf-8-sig: files written on Windows begin with a byte order mark.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise DatasetError(f"cannot read {path} ({error.strerror}): check its permissions") from error
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def names_below(paths: Iterable[Path], folder: Path) -> list[tuple[Path, str]]:
    """Return each path with its name relative to a folder; files elsewhere keep their own name."""
    return [(p, p.relative_to(folder).as_posix() if p.is_relative_to(folder) else p.name) for p in paths]
