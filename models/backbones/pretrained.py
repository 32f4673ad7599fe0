"""Starting weights of a backbone: ImageNet weights fetched once, or a file."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from util.distributed import barrier, is_main_process
from util.errors import CheckpointError

T = TypeVar("T")

logger = logging.getLogger(__name__)


def fetch_once(fetch: Callable[[], T], what: str) -> T:
    """Run a download on the first process, then on the others, which find the file in the cache.

    Args:
        fetch: downloads when the cache does not have the file and returns what was asked for.
        what: what is fetched, for the error message.

    Raises:
        CheckpointError: the download failed; the message says how to train without it.
    """
    if not is_main_process():
        barrier()
    try:
        return fetch()
    except (OSError, RuntimeError) as error:
        hub = Path(torch.hub.get_dir()) / "checkpoints"
        raise CheckpointError(
            f"expected to download {what}, got '{error}': put the file into {hub} (torchvision) or the Hugging Face "
            "cache (timm), or pass --backbone_weights FILE, or --backbone_weights none to start from random weights"
        ) from error
    finally:
        # In a finally clause, so that a failed download does not leave the other processes waiting.
        if is_main_process():
            barrier()


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """Return torchvision's IMAGENET1K_V1 weights of a ResNet, the ones that the published detectors started from."""
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    return fetch_once(
        lambda: weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu"),
        f"the ImageNet weights of {name} ({weights.url})",
    )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a file of named tensors, ``.safetensors`` or saved by ``torch.save``.

    Raises:
        CheckpointError: there is no such file, it needs arbitrary unpickling, or it is no flat dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"expected backbone weights in '{path}', found no file: pass 'imagenet', 'none' or the path of a file"
        )
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"expected only tensors in '{path}', got a file that needs arbitrary unpickling: "
            "save model.state_dict() alone and pass that file"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"expected a flat dictionary of tensors in '{path}', got {type(content).__name__} with other content: "
            "save model.state_dict() alone and pass that file"
        )
    return content


def load_resnet_weights(body: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Copy a torchvision ResNet's weights into a body that has no classifier and may lack later stages.

    Args:
        body: module with torchvision's names.
        state_dict: torchvision's names and shapes.
        source: where the weights come from, for the error message.

    Raises:
        CheckpointError: a tensor of the body is missing, has another shape, or the file has tensors of another model.
    """
    own = body.state_dict()
    missing = [name for name in own if name not in state_dict and not name.endswith("num_batches_tracked")]
    # What a body does without on purpose: the classifier, stages that were cut off, counters of frozen norms.
    spare = re.compile(r"^fc\.|^layer[234]\.|num_batches_tracked$")
    unexpected = [name for name in state_dict if name not in own and not spare.search(name)]
    wrong = [name for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    for names, problem in ((missing, "lacks"), (unexpected, "has unknown"), (wrong, "has other shapes for")):
        if names:
            raise CheckpointError(
                f"expected the weights of this ResNet, but {source} {problem} {len(names)} tensors, such as "
                f"'{names[0]}': pass a file in torchvision's naming that was saved from the same --backbone"
            )
    body.load_state_dict({name: state_dict[name] for name in own if name in state_dict}, strict=False)
    logger.info("backbone weights: %d tensors from %s", len(own), source)
