"""Frames of video files and videos of frames, by PyAV or OpenCV, whichever is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datasets import DatasetError
from util.errors import OptionError


class VideoFile(Protocol):
    """A video that can be read once.

    Attributes:
        rate: frames per second, 25 where the file does not say.
        length: number of frames as the file says, 1 where it does not.
    """

    rate: float
    length: int

    def frames(self) -> Iterator[Image.Image]: ...


class VideoWriter(Protocol):
    """A video that is written frame by frame."""

    def add(self, frame: Image.Image) -> None: ...
    def close(self) -> None: ...


def video_package() -> str:
    """Return "av" or "cv2".

    Raises:
        OptionError: neither is installed.
    """
    for package in ("av", "cv2"):
        if importlib.util.find_spec(package) is not None:
            return package
    raise OptionError("videos need the package av (PyAV) or opencv-python-headless: pip install av")


def open_video(path: Path) -> VideoFile:
    """Open a video.

    Raises:
        OptionError: no package can read it. DatasetError: it is no video.
    """
    return AvFile(path) if video_package() == "av" else Cv2File(path)


def create_video(path: Path, *, rate: float) -> VideoWriter:
    """Start an mp4 video; its size is that of the first frame.

    Raises:
        OptionError: no package can write it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return AvWriter(path, rate=rate) if video_package() == "av" else Cv2Writer(path, rate=rate)


class AvFile:
    """A video read by PyAV."""

    def __init__(self, path: Path) -> None:
        self._av = importlib.import_module("av")
        try:
            self._container = self._av.open(str(path))
            self._stream = self._container.streams.video[0]
        except self._av.FFmpegError as error:
            raise DatasetError(f"not a readable video ({error.strerror})") from error
        except IndexError as error:
            raise DatasetError("not a readable video (it has only sound)") from error
        self.rate = float(self._stream.average_rate or 25)
        self.length = self._stream.frames or 1

    def frames(self) -> Iterator[Image.Image]:
        """Yield RGB frames.

        Raises:
            DatasetError: the file is damaged.
        """
        try:
            for frame in self._container.decode(self._stream):
                yield frame.to_image()
        except self._av.FFmpegError as error:
            raise DatasetError(f"not a readable video ({error.strerror})") from error
        finally:
            self._container.close()


class AvWriter:
    """A video written by PyAV, H.264 where the encoder is there."""

    def __init__(self, path: Path, *, rate: float) -> None:
        self._av = importlib.import_module("av")
        self._container = self._av.open(str(path), "w")
        self._rate = Fraction(rate).limit_denominator(1001)
        self._stream: Any = None

    def add(self, frame: Image.Image) -> None:
        """Append a frame; an odd last row or column is cut off, which the format cannot hold."""
        even = frame.crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2))
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self._rate)
            self._stream.width, self._stream.height = even.size
            self._stream.pix_fmt = "yuv420p"
            self._stream.bit_rate = 8_000_000
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_image(even)))

    def close(self) -> None:
        """Write what is left."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


class Cv2File:
    """A video read by OpenCV."""

    def __init__(self, path: Path) -> None:
        self._cv2 = importlib.import_module("cv2")
        self._capture = self._cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise DatasetError("not a readable video")
        self.rate = self._capture.get(self._cv2.CAP_PROP_FPS) or 25.0
        self.length = max(1, int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)))

    def frames(self) -> Iterator[Image.Image]:
        """Yield RGB frames up to the first that cannot be read; OpenCV does not tell damage from the end."""
        try:
            while True:
                there, pixels = self._capture.read()
                if not there:
                    return
                yield Image.fromarray(self._cv2.cvtColor(pixels, self._cv2.COLOR_BGR2RGB))
        finally:
            self._capture.release()


class Cv2Writer:
    """A video written by OpenCV, MPEG-4."""

    def __init__(self, path: Path, *, rate: float) -> None:
        self._cv2 = importlib.import_module("cv2")
        self._path, self._rate = path, rate
        self._writer: Any = None

    def add(self, frame: Image.Image) -> None:
        """Append a frame.

        Raises:
            OSError: the file cannot be written.
        """
        if self._writer is None:
            code = self._cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = self._cv2.VideoWriter(str(self._path), code, self._rate, frame.size)
            if not self._writer.isOpened():
                raise OSError(f"cannot write {self._path}")
        self._writer.write(self._cv2.cvtColor(np.asarray(frame), self._cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.release()
