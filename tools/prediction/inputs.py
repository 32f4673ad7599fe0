"""Pictures and videos from files, folders and patterns, and a name for what is written about each."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from datasets import DatasetError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".avif"})
VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})


class Input(NamedTuple):
    """One file to look at.

    Attributes:
        path: where it is.
        name: relative path of what is written about it, different for every input, with the suffix of the file.
    """

    path: Path
    name: PurePath

    @property
    def is_video(self) -> bool:
        """Whether the file is a video, by its suffix."""
        return self.path.suffix.lower() in VIDEOS


def find_inputs(sources: Sequence[str], *, recursive: bool = False, leave_out: Path | None = None) -> list[Input]:
    """Return the files that the command line names, each once, in its order; those of a folder by name.

    Args:
        sources: files (any suffix), folders (files with a suffix of `PICTURES` or `VIDEOS`) and patterns with *, ? or
            [...], ** across folders.
        recursive: look into folders of folders.
        leave_out: a folder that folders and patterns take nothing from: where drawn pictures go.

    Raises:
        DatasetError: a source names nothing.
    """
    found: dict[Path, PurePath] = {}
    own = None if leave_out is None else leave_out.resolve()
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file():
            files = {path: PurePath(path.name)}
        else:
            several = _files(path, recursive) if path.is_dir() else _matches(path)
            files = {path: name for path, name in several.items() if own not in path.resolve().parents}
        if not files:
            raise DatasetError(
                f"no picture or video {source}: check the path"
                + (", or pass --recursive" if Path(source).is_dir() and not recursive else "")
            )
        for path, name in files.items():
            found.setdefault(path, name)
    return _with_different_names(found)


def _files(folder: Path, recursive: bool) -> dict[Path, PurePath]:
    entries = folder.rglob("*") if recursive else folder.iterdir()
    files = sorted(path for path in entries if path.suffix.lower() in PICTURES | VIDEOS and path.is_file())
    return {path: path.relative_to(folder) for path in files}


def _matches(pattern: Path) -> dict[Path, PurePath]:
    paths = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    return {path: PurePath(path.name) for path in paths if path.is_file()}


def _with_different_names(found: dict[Path, PurePath]) -> list[Input]:
    """Number names that several files of different folders would share: a.jpg, a_2.jpg, a_3.jpg."""
    taken: set[PurePath] = set()
    inputs = []
    for path, wanted in found.items():
        # Without the suffix: what is drawn of a.bmp and a.png is a.png both.
        name, number = wanted, 1
        while name.with_suffix("") in taken:
            number += 1
            name = wanted.with_stem(f"{wanted.stem}_{number}")
        taken.add(name.with_suffix(""))
        inputs.append(Input(path, name))
    return inputs
