"""A trained detector as a function from pictures to boxes.

Example::

    predictor = Predictor("checkpoint.pth", device="cuda")
    found = predictor("street.jpg")
    found.boxes_xyxy, found.scores, found.names
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datasets import DatasetError
from datasets.images import decode_image
from datasets.transforms import EvalTransform
from models.inference import prepare_for_inference
from tools.detector import load_detector
from util.distributed import pick_device
from util.errors import OptionError
from util.nested_tensor import nested_tensor_from_tensor_list
from util.plots import draw_boxes
from util.step import autocast

Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best score first.

    Attributes:
        boxes_xyxy: (n, 4) float32, left, top, right, bottom in pixels of the original picture.
        scores: (n,) float32 in [0, 1].
        labels: (n,) int64.
        class_names: of every label the detector knows, K in all.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[label] for label in self.labels]

    def to_supervision(self) -> Any:
        """Return the same as `supervision.Detections`, class names under `data["class_name"]`.

        Raises:
            OptionError: the package is missing.
        """
        if importlib.util.find_spec("supervision") is None:
            raise OptionError("to_supervision needs the package supervision: pip install supervision")
        supervision = importlib.import_module("supervision")
        return supervision.Detections(
            xyxy=self.boxes_xyxy,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, picture: Image.Image) -> Image.Image:
        """Return a copy of the picture with the boxes; the best lie on top."""
        worst_first = slice(None, None, -1)
        texts = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        boxes, labels = (torch.from_numpy(values[worst_first].copy()) for values in (self.boxes_xyxy, self.labels))
        return draw_boxes(picture, boxes, texts[worst_first], labels)


class Predictor:
    """Detects objects in pictures of any origin with the weights, options and class names of one file.

    Args:
        checkpoint, options, averaged: see `tools.detector.load_detector`.
        device: where to compute; the CPU, with a warning, when a GPU is asked for and there is none.
        score_threshold: detections below are left out.
        top_k: most detections per picture; None keeps all that the model gives.
        batch_size: pictures per forward pass. Pictures of different size are padded to a common one, which shifts
            results a little; with 1 they do not depend on their neighbours.
        amp: mixed precision; amp_dtype: "float16" or "bfloat16", None for the former on a GPU and the latter on a CPU.
        scale, max_size: short side and longest side the picture is resized to; None as in the run's evaluation.
        class_names: of every label, instead of those in the file.
        compile: generate code for the detector at the first picture and at the first of another size, see
            `models.compiling.CompiledForInference`; pays for many pictures.

    Attributes:
        class_names: of every label; category_ids: see `tools.detector.Detector`.

    Raises:
        CheckpointError: the file cannot be used. OptionError: a setting cannot be honoured.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str = "cuda",
        options: Sequence[str] = (),
        averaged: bool | None = None,
        score_threshold: float = 0.3,
        top_k: int | None = None,
        batch_size: int = 1,
        amp: bool = False,
        amp_dtype: str | None = None,
        scale: int | None = None,
        max_size: int | None = None,
        class_names: Sequence[str] | None = None,
        compile: bool = False,
    ) -> None:
        if batch_size < 1 or (top_k is not None and top_k < 1) or not 0 <= score_threshold <= 1:
            raise OptionError(
                "expected a batch size and a number of detections of at least 1 and a score threshold from 0 to 1, got "
                f"{batch_size}, {top_k} and {score_threshold}"
            )
        self.device = pick_device(device)
        self.detector = load_detector(checkpoint, self.device, options=options, averaged=averaged)
        self._model = prepare_for_inference(self.detector.model, compile=compile)
        known = len(self.detector.class_names)
        if class_names is not None and len(class_names) != known:
            raise OptionError(f"expected {known} class names, one per label of the model, got {len(class_names)}")
        self.class_names = list(class_names or self.detector.class_names)
        self.category_ids = self.detector.category_ids
        args = self.detector.args
        self.transform = EvalTransform(
            scale=args.eval_scale if scale is None else scale,
            max_size=args.data_aug_max_size if max_size is None else max_size,
        )
        self.score_threshold, self.top_k, self.batch_size = score_threshold, top_k, batch_size
        self._amp, self._amp_dtype = amp, amp_dtype

    @overload
    def __call__(self, images: Picture) -> Detections: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Detections]: ...

    def __call__(self, images: Any) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            images: a path; a PIL picture; an array (H, W, 3) uint8, RGB (not OpenCV's BGR); a tensor (3, H, W) RGB,
                uint8 or floats in [0, 1]; or a list of these.

        Returns:
            Detections of the picture, or a list of them.

        Raises:
            DatasetError: a file cannot be read, or something else is no picture.
        """
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        found = []
        for first in range(0, len(images), self.batch_size):
            pictures = [read_picture(image) for image in images[first : first + self.batch_size]]
            sizes = [picture.size for picture in pictures]
            found += self.detect([self.prepare(picture) for picture in pictures], sizes)
        return found

    def prepare(self, picture: Image.Image) -> Tensor:
        """Resize and normalise an RGB picture as the evaluation does; (3, H, W) float32."""
        nothing = {"boxes": torch.zeros(0, 4), "area": torch.zeros(0)}
        return self.transform(picture, nothing)[0]

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], sizes_wh: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detect objects in one batch.

        Args:
            images: from `prepare`.
            sizes_wh: width and height of the original pictures.
        """
        samples = nested_tensor_from_tensor_list(images).to(self.device)
        sizes = torch.tensor([(height, width) for width, height in sizes_wh], device=self.device)
        with autocast(self.device, enabled=self._amp, dtype=self._amp_dtype):
            outputs = self._model(samples)
        results = self.detector.postprocess(outputs, sizes)
        return [self._select({name: value.cpu() for name, value in result.items()}) for result in results]

    def _select(self, result: dict[str, Tensor]) -> Detections:
        kept = (result["scores"] >= self.score_threshold).nonzero().flatten()[: self.top_k]
        boxes, scores, labels = (result[name][kept].numpy() for name in ("boxes", "scores", "labels"))
        return Detections(boxes, scores, labels, self.class_names)


def read_picture(source: Picture) -> Image.Image:
    """Turn what `Predictor` takes into an 8-bit RGB picture, files the way the training data is read.

    Raises:
        DatasetError: the file cannot be read, or the array or tensor has another layout.
    """
    if isinstance(source, (str, Path)):
        try:
            return decode_image(Path(source).expanduser().read_bytes())
        except OSError as error:
            raise DatasetError(f"{source}: cannot read the file ({error.strerror})") from error
        except DatasetError as error:
            raise DatasetError(f"{source}: {error}") from error
    if isinstance(source, Image.Image):
        if source.mode.startswith(("I", "F")):
            raise DatasetError(f"expected an 8-bit picture, got PIL mode {source.mode}: pass the path of the file")
        return source.convert("RGB")
    if isinstance(source, Tensor) and source.ndim == 3 and len(source) == 3:
        return _from_tensor(source.detach().cpu())
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] == 3 and source.dtype == np.uint8:
        return Image.fromarray(source)
    what = f"{tuple(source.shape)} {source.dtype}" if isinstance(source, (np.ndarray, Tensor)) else type(source)
    raise DatasetError(f"expected a path, a PIL picture, an array (H, W, 3) uint8 or a tensor (3, H, W), got {what}")


def _from_tensor(pixels: Tensor) -> Image.Image:
    if pixels.is_floating_point():
        if not ((pixels >= 0) & (pixels <= 1)).all():
            raise DatasetError(
                f"expected a float tensor of values in [0, 1], got {pixels.min():g} to {pixels.max():g}: pass the "
                "picture before it is normalised"
            )
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype is not torch.uint8:
        raise DatasetError(f"expected a uint8 or float tensor, got {pixels.dtype}")
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
