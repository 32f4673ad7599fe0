"""Pictures from files: whatever the file holds becomes 8-bit RGB, and a bad file becomes one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from .annotations import DatasetError

# What Pillow raises on damaged files, found by cutting and overwriting files of every format.
T = TypeVar("T")
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode_image(encoded: bytes) -> Image.Image:
    """Decode a picture into 8-bit RGB.

    Gray, palette and CMYK pictures are converted by Pillow, an alpha channel is dropped (both as official). 16-bit
    gray keeps its high byte, where the official code would clip every value above 255 to white. EXIF rotation is
    ignored, as in the official code: COCO's boxes refer to the pixels as stored.

    Args:
        encoded: content of the file.

    Raises:
        DatasetError: the bytes are no picture, a damaged one, or one whose range of values is unknown.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        image.load()
        if image.mode == "F":
            raise DatasetError("floating-point pictures have no known range: store them with 8 or 16 bits")
        if image.mode.startswith("I"):
            image = _high_byte(image)
        return image.convert("RGB")
    except DatasetError:
        raise
    except UnidentifiedImageError as error:
        raise DatasetError("not a readable picture (of no known format)") from error
    except _DECODE_ERRORS as error:
        raise DatasetError(f"not a readable picture ({error})") from error


def _high_byte(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DatasetError(f"values {values.min()} to {values.max()} do not fit 16 bits: store it with 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


class ImageFolder:
    """Pictures of one folder, read by position.

    Args:
        folder: folder that holds the files.
        names: file names relative to it.
        ids: image ids, for messages.
        keep_bytes: read every file now and keep its encoded bytes in memory.
        allow_missing: do not refuse missing files now; reading one raises.

    Raises:
        DatasetError: the folder is missing, or a file is and ``allow_missing`` is False.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], ids: Sequence[int], *, keep_bytes: bool, allow_missing: bool
    ) -> None:
        if not folder.is_dir():
            raise DatasetError(f"no image folder {folder}; --coco_path must hold {folder.name} and annotations")
        self.folder = folder
        self.names = list(names)
        self.ids = list(ids)
        missing = self._missing()
        if missing and not allow_missing:
            first = missing[0]
            raise DatasetError(
                f"{len(missing)} of {len(names)} pictures are missing in {folder}, the first is {names[first]} "
                f"(image id {ids[first]}); complete the folder or pass --skip_bad_images"
            )
        absent = set(missing)
        self._encoded: list[bytes | None] | None = None
        if keep_bytes:
            self._encoded = [None if i in absent else self._read_bytes(i) for i in range(len(self.names))]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> Image.Image:
        """Decode one picture.

        Raises:
            DatasetError: the file is missing or unreadable; the message has its path and image id.
        """
        return self.read_with(decode_image, position)

    def read_with(self, decode: Callable[[bytes], T], position: int) -> T:
        """Decode one picture with a function of one's own.

        Args:
            decode: turns the content of a file into a picture; raises `DatasetError` when it cannot.
            position: of the picture.

        Raises:
            DatasetError: as `read`.
        """
        try:
            encoded = self._encoded[position] if self._encoded is not None else None
            return decode(encoded if encoded is not None else self._read_bytes(position))
        except DatasetError as error:
            raise DatasetError(f"{self.describe(position)}: {error}; replace it or pass --skip_bad_images") from error

    def describe(self, position: int) -> str:
        """Return path and image id of one picture, for messages."""
        return f"{self.folder / self.names[position]} (image id {self.ids[position]})"

    def _read_bytes(self, position: int) -> bytes:
        try:
            return (self.folder / self.names[position]).read_bytes()
        except OSError as error:
            raise DatasetError(f"cannot read the file ({error.strerror})") from error

    def _missing(self) -> list[int]:
        # One listing instead of a call per file: 118,287 calls take minutes on a network file system.
        present = {entry.name for entry in self.folder.iterdir()}
        return [
            position
            for position, name in enumerate(self.names)
            if name not in present and not ("/" in name and (self.folder / name).is_file())
        ]
