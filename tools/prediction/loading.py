"""From files to detections: read by threads ahead of the detector, batch by batch, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from datasets import DatasetError
from tools.prediction.inputs import Input
from tools.prediction.outputs import Result
from tools.prediction.video import open_video
from tools.predictor import Predictor, read_picture
from util.step import in_groups

Complaint = Callable[[Input, DatasetError], None]


class Loaded(NamedTuple):
    """One picture or frame, ready for the detector.

    Attributes:
        source: the file; picture: as stored; image: as the model takes it.
        frame: number in a video; rate: its frames per second.
    """

    source: Input
    picture: Image.Image
    image: Tensor
    frame: int | None = None
    rate: float = 0.0


def number_of_pictures(source: Input) -> int:
    """Return how many pictures a file holds, by what it says of itself."""
    if not source.is_video:
        return 1
    try:
        return open_video(source.path).length
    except DatasetError:
        return 1  # named when its turn comes


def load(
    predictor: Predictor,
    inputs: Sequence[Input],
    pool: ThreadPoolExecutor,
    ahead: int,
    fail: Complaint,
) -> Iterator[Loaded]:
    """Yield what can be read, in order, read by a pool of threads.

    Args:
        ahead: pictures read before they are asked for; bounds the memory.
        fail: told what cannot be read.
    """
    jobs = _jobs(predictor, inputs, pool, fail)
    waiting: deque[tuple[Input, Future[Loaded]]] = deque()
    while True:
        waiting.extend(islice(jobs, ahead - len(waiting)))
        if not waiting:
            return
        source, future = waiting.popleft()
        try:
            yield future.result()
        except DatasetError as error:
            fail(source, error)


def _jobs(
    predictor: Predictor,
    inputs: Sequence[Input],
    pool: ThreadPoolExecutor,
    fail: Complaint,
) -> Iterator[tuple[Input, Future[Loaded]]]:
    def read(source: Input) -> Loaded:
        picture = read_picture(source.path)
        return Loaded(source, picture, predictor.prepare(picture))

    def prepare(source: Input, picture: Image.Image, frame: int, rate: float) -> Loaded:
        return Loaded(source, picture, predictor.prepare(picture), frame, rate)

    for source in inputs:
        if not source.is_video:
            yield source, pool.submit(read, source)
            continue
        try:
            video = open_video(source.path)
            for number, picture in enumerate(video.frames()):
                yield source, pool.submit(prepare, source, picture, number, video.rate)
        except DatasetError as error:
            fail(source, error)


def detect(predictor: Predictor, loaded: Iterator[Loaded]) -> Iterator[Result]:
    """Yield the detections of every picture, batch by batch."""
    for batch in in_groups(loaded, predictor.batch_size):
        found = predictor.detect([item.image for item in batch], [item.picture.size for item in batch])
        for item, detections in zip(batch, found, strict=True):
            yield Result(item.source, item.picture, detections, item.frame, item.rate)
