"""Headers and contents of picture files, read by several threads."""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from datasets.annotations import DatasetError
from datasets.images import decode_image

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
# The rest of a file after its end mark is small; far from the end the mark may be a preview's.
_TAIL = 65536
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_EXIF_ORIENTATION = 0x0112
_HEADER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class Picture(NamedTuple):
    """What a file says about its picture.

    Attributes:
        width, height: pixels as stored, 0 where unreadable.
        orientation: EXIF's tag; 1 = upright, 5 to 8 swap width and height.
        sha256: of the file's bytes, "" unless asked for.
        fault: why it cannot be used, "" if it can.
        is_missing: there is no such file.
    """

    width: int
    height: int
    orientation: int = 1
    sha256: str = ""
    fault: str = ""
    is_missing: bool = False


def read_pictures(
    paths: Iterable[Path], *, hashed: bool = True, decode: bool = False, threads: int | None = None
) -> list[Picture]:
    """Read the headers of picture files in parallel.

    Args:
        paths: the files.
        hashed: compute the sha256 of each.
        decode: decode every picture, as training does. Otherwise only files whose end is missing are decoded: cut ones
            are found, damage in the middle is not.
        threads: how many read at a time; None takes four per core, since most of the time is spent waiting for files.
    """
    workers = threads or min(32, 4 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(lambda path: read_picture(path, hashed=hashed, decode=decode), paths))


def read_picture(path: Path, *, hashed: bool = True, decode: bool = False) -> Picture:
    """Read the header of one picture file; see `read_pictures`."""
    if not path.is_file():
        return Picture(0, 0, fault="no such file", is_missing=True)
    sha256 = ""
    try:
        with path.open("rb") as file:
            content = file.read() if hashed or decode else None
            sha256 = hashlib.sha256(content).hexdigest() if hashed and content is not None else ""
            stream = file if content is None else io.BytesIO(content)
            with Image.open(stream) as image:
                width, height = image.size
                image_format = image.format or ""
                # Other formats keep the tag where only decoding finds it, and cameras write JPEG.
                orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if image_format in ("JPEG", "MPO") else 1
            if decode or not _has_end_mark(path, image_format):
                decode_image(path.read_bytes() if content is None else content)
    except DatasetError as error:
        return Picture(0, 0, sha256=sha256, fault=str(error))
    except _HEADER_ERRORS as error:
        return Picture(0, 0, sha256=sha256, fault=f"not a readable picture ({type(error).__name__})")
    return Picture(width, height, orientation, sha256)


def _has_end_mark(path: Path, image_format: str) -> bool:
    mark = _END_MARKS.get(image_format)
    if mark is None:
        return True
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, _TAIL), os.SEEK_END)
        return mark in file.read()


def is_picture(path: Path) -> bool:
    """Return whether a file's name ends as a picture's."""
    return path.suffix.lower() in PICTURE_SUFFIXES
