"""Run an exported detector beside the one in PyTorch: how far their answers lie apart, and who is faster."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from datasets.images import decode_image
from datasets.scenes import render_scene
from datasets.transforms import resized_hw
from models.postprocess import PostProcess
from util.errors import ExportError
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.pixels import IMAGE_MEAN, IMAGE_STD

from .wrapper import RAW_OUTPUTS

# Largest difference allowed, of probabilities and of boxes relative to the picture. Both sides compute in float32; a
# tenth of a pixel in a picture of 1,000.
TOLERANCE = 1e-4
PICTURES = 4
BATCHES = (slice(0, 1), slice(1, PICTURES))
# Scenes are square; windows of them are not. (left, top, right, bottom)
WINDOWS = ((0, 0, 128, 92), (0, 0, 128, 107), (10, 0, 109, 128), (0, 20, 101, 128))

Outputs = dict[str, Tensor]


class Batch(NamedTuple):
    """Pictures for a comparison.

    Attributes:
        images: (B, 3, H, W) in [0, 1]; padding_mask: (B, H, W), True = padding; sizes: (B, 2) height and width.
    """

    images: Tensor
    padding_mask: Tensor
    sizes: Tensor


def read_pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """Return four pictures: the first of the given files and folders, again and again if there are fewer, or rendered.

    Raises:
        ExportError: there is no picture at a path. DatasetError: a file is not a picture.
    """
    if not paths:
        scenes = (render_scene(np.random.default_rng(number))[0] for number in itertools.count())
        return [scene.crop(window) for scene, window in zip(scenes, WINDOWS, strict=False)]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise ExportError(f"no pictures in {', '.join(missing or map(str, paths))}: pass picture files or their folder")
    return [decode_image(file.read_bytes()) for file in itertools.islice(itertools.cycle(files), PICTURES)]


def make_batches(
    pictures: Sequence[Image.Image], *, scale: int, max_size: int, smallest: int, padded: bool
) -> list[Batch]:
    """Resize pictures as evaluation does and lay them out as a batch of one and a batch of three.

    Args:
        pictures: four.
        scale, max_size: short side, and the most a long side may have; smallest: no side is shorter.
        padded: let the pictures of a batch differ in size; otherwise they are stretched to the size of the first.
    """
    batches = []
    for window in BATCHES:
        images: list[Tensor] = []
        for picture in pictures[window]:
            height, width = (max(side, smallest) for side in resized_hw(*picture.size, scale, max_size))
            if images and not padded:
                height, width = images[0].shape[1:]
            pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        nested = nested_tensor_from_tensor_list(images)
        sizes = torch.tensor([image.shape[1:] for image in images])
        batches.append(Batch(*nested.decompose(), sizes))
        # The second batch has another size, whatever the pictures.
        scale = max(smallest, scale * 4 // 5)
    return batches


def reference_runner(model: nn.Module, postprocess: PostProcess | None) -> Callable[[Batch], Outputs]:
    """Return a function that runs the detector as it is used in PyTorch."""

    @torch.no_grad()
    def run(batch: Batch) -> Outputs:
        images = normalize(batch.images, IMAGE_MEAN, IMAGE_STD).masked_fill(batch.padding_mask[:, None], 0)
        outputs = model(NestedTensor(images, batch.padding_mask))
        if postprocess is None:
            return {name: outputs[name] for name in RAW_OUTPUTS}
        results = postprocess(outputs, batch.sizes)
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    return run


def program_runner(path: Path, inputs: Sequence[str]) -> Callable[[Batch], Outputs]:
    """Load a .pt2 file and return a function that runs it with the named inputs."""
    with warnings.catch_warnings():
        # The file's bytes become tensors that nobody writes to; torch warns about each.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        program = torch.export.load(path).module()
    others = [name for name in inputs if name != "images"]

    @torch.no_grad()
    def run(batch: Batch) -> Outputs:
        return program(batch.images, **{name: getattr(batch, name) for name in others})

    return run


def onnx_runner(path: Path) -> Callable[[Batch], Outputs]:
    """Load an ONNX file into ONNX Runtime, on the CPU with as many threads as torch, and return a function for it."""
    import onnxruntime  # optional: see trace.require_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with _naming_the_runtime():
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]

    def run(batch: Batch) -> Outputs:
        with _naming_the_runtime():
            values = session.run(None, {name: getattr(batch, name).numpy() for name in inputs})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}

    return run


@contextmanager
def _naming_the_runtime() -> Iterator[None]:
    """Turn what ONNX Runtime raises, kinds of errors without a common name, into an ExportError."""
    try:
        yield
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the exported model: {str(error).strip().splitlines()[0]}") from error


def differences(expected: Outputs, actual: Outputs, *, sizes: Tensor, any_order: bool) -> dict[str, float]:
    """Return the largest differences of boxes and probabilities between two answers.

    Args:
        expected, actual: of the same batch.
        sizes: (B, 2), what boxes in pixels are divided by.
        any_order: a query may stand elsewhere: two-stage queries are sorted by scores that may be as good as equal.

    Returns:
        "boxes", relative to the picture, and "probabilities".
    """
    if "scores" in expected:
        return _differences_of_detections(expected, actual, sizes)
    found = [torch.cat((each["pred_boxes"], each["pred_logits"].sigmoid()), dim=-1) for each in (expected, actual)]
    if any_order:
        nearest = torch.cdist(found[0], found[1], p=float("inf")).argmin(dim=2)
        found[1] = found[1].gather(1, nearest[..., None].expand_as(found[0]))
    gaps = (found[0] - found[1]).abs().flatten(0, 1).amax(0)
    return {"boxes": float(gaps[:4].max()), "probabilities": float(gaps[4:].max())}


def _differences_of_detections(expected: Outputs, actual: Outputs, sizes: Tensor) -> dict[str, float]:
    """Compare sorted detections: scores place by place, boxes with those of equal label and score.

    Detections whose score is that of the last one may have been left out on the other side, and are not asked for.
    """
    probabilities = float((expected["scores"] - actual["scores"]).abs().max())
    scale = sizes.flip(1).repeat(1, 2)[:, None]
    first, second = expected["boxes"] / scale, actual["boxes"] / scale
    apart = (first[:, :, None] - second[:, None]).abs().amax(-1)
    partner = (expected["scores"][:, :, None] - actual["scores"][:, None]).abs() <= TOLERANCE
    partner &= expected["labels"][:, :, None] == actual["labels"][:, None]
    nearest = apart.masked_fill(~partner, float("inf")).amin(-1)
    asked = expected["scores"] > expected["scores"][:, -1:] + TOLERANCE
    return {"boxes": float(nearest[asked].max()) if bool(asked.any()) else 0.0, "probabilities": probabilities}


def check(
    reference: Callable[[Batch], Outputs],
    exported: Callable[[Batch], Outputs],
    batches: Sequence[Batch],
    *,
    any_order: bool,
) -> dict[str, Any]:
    """Compare all batches.

    Returns:
        "boxes" and "probabilities", the largest differences, and "batches", the shapes compared.

    Raises:
        ExportError: a difference above `TOLERANCE`, or a number that is not finite.
    """
    worst = {"boxes": 0.0, "probabilities": 0.0}
    for batch in batches:
        found = differences(reference(batch), exported(batch), sizes=batch.sizes, any_order=any_order)
        for name, value in found.items():
            if not value <= TOLERANCE:
                raise ExportError(
                    f"the exported model is not equal to the one in PyTorch: {name} differ by {value:.2g} on a batch "
                    f"of shape {tuple(batch.images.shape)}, {TOLERANCE:g} are allowed; nothing was written"
                )
            worst[name] = max(worst[name], value)
    return {**worst, "batches": [list(batch.images.shape) for batch in batches]}
