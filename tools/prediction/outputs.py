"""What is written about detections: drawn pictures, JSON lines, COCO results, CSV.

Every writer has `add` for one picture or frame after the other, in the order of the inputs, and `close`.
"""

from __future__ import annotations

import csv
import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from tools.prediction.inputs import Input
from tools.prediction.video import VideoWriter, create_video
from tools.predictor import Detections

FORMATS = ("pictures", "coco", "json_lines", "csv")
CSV_COLUMNS = ("file", "frame", "class", "label", "score", "left", "top", "right", "bottom")


class Result(NamedTuple):
    """What was found in one picture, or in one frame of a video.

    Attributes:
        source: the file; picture: its pixels, RGB; found: the detections.
        frame: number of the frame from 0, None for a picture; rate: frames per second of the video.
    """

    source: Input
    picture: Image.Image
    found: Detections
    frame: int | None = None
    rate: float = 0.0


class Writer(Protocol):
    """Where results go."""

    def add(self, result: Result) -> None: ...
    def close(self) -> None: ...


class PictureWriter:
    """Draws every picture into a folder, frames into one video per input.

    JPEG files stay JPEG, all others become PNG, videos mp4.

    Args:
        folder: where the files go, below it the folders of the inputs.
        pool: draws and encodes pictures beside the detection.
        most_waiting: pictures kept in memory for it.
    """

    def __init__(self, folder: Path, pool: ThreadPoolExecutor, *, most_waiting: int) -> None:
        self._folder, self._pool, self._most_waiting = folder, pool, most_waiting
        self._waiting: deque[Future[None]] = deque()
        self._video: tuple[Input, VideoWriter] | None = None

    def add(self, result: Result) -> None:
        """Draw one picture or frame.

        Raises:
            OSError: a file cannot be written; of this picture or of one before.
        """
        if self._video is not None and self._video[0] != result.source:
            self._close_video()
        if result.frame is None:
            self._waiting.append(self._pool.submit(self._draw, result))
            while len(self._waiting) > self._most_waiting:
                self._waiting.popleft().result()
            return
        if self._video is None:
            path = self._folder / result.source.name.with_suffix(".mp4")
            self._video = (result.source, create_video(path, rate=result.rate))
        self._video[1].add(result.found.draw(result.picture))

    def close(self) -> None:
        """Wait for the last pictures."""
        self._close_video()
        while self._waiting:
            self._waiting.popleft().result()

    def _close_video(self) -> None:
        if self._video is not None:
            self._video[1].close()
            self._video = None

    def _draw(self, result: Result) -> None:
        name = result.source.name
        path = self._folder / (name if name.suffix.lower() in (".jpg", ".jpeg") else name.with_suffix(".png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        result.found.draw(result.picture).save(path, quality=92)  # of JPEG; PNG has none


class JsonLinesWriter:
    """Writes one JSON object per picture or frame, at once: what was done before a crash is there."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, result: Result) -> None:
        """Append a line."""
        found = result.found
        columns = zip(found.names, *_plain(found), strict=True)
        line = {
            "file": str(result.source.path),
            **({} if result.frame is None else {"frame": result.frame}),
            "width": result.picture.width,
            "height": result.picture.height,
            "detections": [
                {"class": name, "label": label, "score": score, "box_xyxy": box} for name, label, score, box in columns
            ],
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CsvWriter:
    """Writes one row per detection."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(CSV_COLUMNS)

    def add(self, result: Result) -> None:
        """Append the detections of one picture or frame."""
        frame = "" if result.frame is None else result.frame
        for name, label, score, box in zip(result.found.names, *_plain(result.found), strict=True):
            self._rows.writerow((result.source.path, frame, name, label, score, *box))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CocoWriter:
    """Writes COCO results (`coco_results.json`) and the pictures they belong to (`coco_images.json`).

    Args:
        folder: where the two files go.
        categories: label -> category id.
        class_names: of every label.
        image_ids: file name -> image id; None numbers the pictures and frames from 1.
    """

    def __init__(
        self,
        folder: Path,
        *,
        categories: Sequence[int],
        class_names: Sequence[str],
        image_ids: Mapping[str, int] | None = None,
    ) -> None:
        self._folder, self._categories, self._image_ids = folder, categories, image_ids
        self._images: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._listed = [
            {"id": category, "name": name}
            for category, name in zip(categories, class_names, strict=True)
            if category >= 0 and name != "N/A"
        ]

    def add(self, result: Result) -> None:
        """Remember the detections of one picture or frame."""
        name = result.source.path.name
        image_id = len(self._images) + 1 if self._image_ids is None else self._image_ids[name]
        entry = {"id": image_id, "file_name": str(result.source.name), "width": result.picture.width}
        frame = {} if result.frame is None else {"frame": result.frame}
        self._images.append({**entry, "height": result.picture.height, **frame})
        for label, score, (left, top, right, bottom) in zip(*_plain(result.found), strict=True):
            # Thousandths of a pixel, as the evaluation compares them.
            box = [round(value, 3) for value in (left, top, right - left, bottom - top)]
            category = self._categories[label]
            self._results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})

    def close(self) -> None:
        """Write both files."""
        _write_json(self._folder / "coco_results.json", self._results)
        _write_json(self._folder / "coco_images.json", {"images": self._images, "categories": self._listed})


def _plain(found: Detections) -> tuple[list[int], list[float], list[list[float]]]:
    # The shortest decimals that give the same float32.
    scores = [float(str(score)) for score in found.scores]
    boxes = [[float(str(value)) for value in box] for box in found.boxes_xyxy]
    return found.labels.tolist(), scores, boxes


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)
