"""Checkpoint files: written so that a crash never leaves half a file, read without running code from them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open

from .distributed import barrier, is_main_process
from .errors import CheckpointError

LATEST = "checkpoint.pth"
SAFETENSORS = ".safetensors"
_log = logging.getLogger(__name__)


def atomic_save(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint with `atomic_write`.

    Raises:
        CheckpointError: as `atomic_write`.
    """
    atomic_write(lambda file: torch.save(dict(content), file), path)


def atomic_write(write: Callable[[BinaryIO], None], path: Path) -> None:
    """Write a file that is either complete or not there: temporary file, fsync, rename, fsync of the folder.

    Args:
        write: puts the content into the open file.
        path: name of the complete file.

    Raises:
        CheckpointError: the folder cannot be written to or is full; a file that was there is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch wraps what the operating system says when a write fails into a RuntimeError.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = _os_reason(error)
        raise CheckpointError(
            f"cannot write {path}: {reason}; what was saved before is intact. Free space there or choose another "
            "--output_dir, then go on with --resume auto"
        ) from error


def save_latest(content: Mapping[str, Any], folder: Path, keep: int = 2) -> Path:
    """Write `checkpoint.pth` and keep its predecessors as `checkpoint_prev1.pth`, `checkpoint_prev2.pth`, ...

    Args:
        content: what to save.
        folder: where.
        keep: files kept in all, at least 1.

    Raises:
        CheckpointError: as `atomic_save`.
    """
    chain = [folder / LATEST, *(folder / f"checkpoint_prev{i}.pth" for i in range(1, keep))]
    new = folder / f".new_{LATEST}"
    # Left by processes that were killed while they saved; only process 0 of one run writes here.
    for unfinished in folder.glob(".*.pth.*.tmp"):
        unfinished.unlink(missing_ok=True)
    atomic_save(content, new)
    # From the oldest on: at every moment each file of the chain is complete.
    for older, newer in zip(chain[:0:-1], chain[-2::-1], strict=True):
        if newer.exists():
            os.replace(newer, older)
    os.replace(new, chain[0])
    _sync_folder(folder)
    return chain[0]


def load_checkpoint(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; only tensors, plain values and an options namespace are accepted.

    Args:
        source: a file, or an https address (fetched once by process 0 into torch hub's folder). A name that ends in
            .safetensors is read as that format, see `read_safetensors`.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, or in need of unpickling other objects.
    """
    path = local_file(source)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: check the path")
    if path.suffix == SAFETENSORS:
        return read_safetensors(path)
    try:
        _check_sums(path)
        # Official files hold the options as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"checkpoint {path} holds more than tensors and plain values, and reading it could run code: refused. "
                "Save its weights alone, as {'model': model.state_dict()}"
            ) from error
        raise CheckpointError(_damaged(path, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(_damaged(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a checkpoint with the entry 'model', {path} holds a {type(content).__name__}")
    return content


def local_file(source: str | Path) -> Path:
    """Return the path of a file; one behind an https address is fetched first.

    Raises:
        CheckpointError: the address is not https, or cannot be fetched.
    """
    return _download(str(source)) if urlsplit(str(source)).scheme in ("http", "https") else Path(source).expanduser()


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read the weights of a safetensors file, and what `tools.convert_checkpoint` writes beside them.

    Returns:
        `model`; `options`, `class_names` and `category_ids` where the file has them.

    Raises:
        CheckpointError: damaged, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            beside = file.metadata() or {}
        entries = {key: json.loads(beside[key]) for key in ("options", "class_names", "category_ids") if key in beside}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    return {"model": weights, **entries}


def model_weights(content: Mapping[str, Any], source: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, without the `module.` of a parallel wrapper.

    Raises:
        CheckpointError: there are none.
    """
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"expected weights under 'model' in {source}, found only {', '.join(map(str, content))}")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def load_newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Read the newest checkpoint of a folder that is not damaged, with a warning for each that is.

    Returns:
        (content, path), or None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and none can be read.
    """
    candidates = [path for path in folder.glob("checkpoint*.pth") if not path.stem.endswith("_beforedrop")]
    # The chain of latest files first among files of one time stamp.
    candidates.sort(key=lambda path: (path.stat().st_mtime_ns, path.name == LATEST), reverse=True)
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except CheckpointError as error:
            _log.warning("%s; falling back to the one before", error)
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {folder} can be read")
    return None


def _download(url: str) -> Path:
    if urlsplit(url).scheme != "https":
        raise CheckpointError(f"expected an https address, got {url}: weights are not fetched over plain http")
    name = f"{sha256(url.encode()).hexdigest()[:12]}_{Path(urlsplit(url).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if is_main_process() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (URLError, OSError) as error:
            raise CheckpointError(f"cannot fetch {url}: {error}. Fetch it by hand and pass the file") from error
    barrier()
    return path


def _check_sums(path: Path) -> None:
    # torch reads past flipped bits: it writes the archive's check sums and does not compare them.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong check sum of {damaged}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(path: Path, error: Exception) -> str:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return f"checkpoint {path} is damaged or no checkpoint ({first_line[:150]})"


def _os_reason(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
