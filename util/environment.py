"""Where and with what a run was started: versions, device, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .distributed import get_world_size, is_main_process
from .logger import append_json_line

ENVIRONMENT_FILE = "environment.jsonl"
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pycocotools", "pillow", "timm")
_ROOT = Path(__file__).resolve().parents[1]


def record_environment(folder: Path | None, device: torch.device) -> None:
    """Append one line to `environment.jsonl` for this start of the program; process 0 with an output folder does."""
    if folder is not None and is_main_process():
        append_json_line(folder / ENVIRONMENT_FILE, describe_environment(device))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return time, versions, device, number of processes and commit; None where something is not known."""
    return {
        "started": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": get_world_size(),
        "cpu_cores": os.cpu_count(),
        "system": platform.platform(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    # Without a folder of its own git would name the commit of a repository around this one.
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
