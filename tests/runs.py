"""Small runs of the whole program in processes of their own, for tests of what survives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from util.checkpoint import load_checkpoint
from util.errors import CheckpointError

REPOSITORY = Path(__file__).resolve().parents[1]
OPTIONS = (
    "-m dn_dab_detr --use_dn --backbone resnet18 --backbone_weights none --backbone_stages 2 --device cpu "
    "--batch_norm_type BatchNorm2d --enc_layers 1 --dec_layers 2 --dim_feedforward 32 --num_queries 8 --batch_size 1 "
    "--data_aug_scales 48 --data_aug_scales2_resize 48 --data_aug_scales2_crop 24 32 --eval_scale 48 --num_workers 0 "
    "--label_mapping contiguous --dropout 0.1 --dist_timeout 1"
)


def write_pictures(root: Path, num_train: int = 12, num_val: int = 3) -> Path:
    """Write a small data set in COCO's layout: a coloured rectangle on noise, every third picture without an object."""
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number in range(count):
            image_id = 100 * (split == "val") + number + 1
            pixels = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            left, top = (int(value) for value in rng.integers(0, 20, 2))
            if number % 3 != 2:
                pixels[top : top + 20, left : left + 30] = (250, 40, 40)
                box = {"bbox": [left, top, 30, 20], "area": 600, "iscrowd": 0, "category_id": 1 + number % 2}
                annotations.append({"id": image_id, "image_id": image_id, **box})
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{image_id}.png")
            images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 64, "height": 48})
        categories = [{"id": 1, "name": "leaf"}, {"id": 2, "name": "brick"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def command(data: Path, output: Path, *more: Any) -> list[str]:
    """Return main.py's command line of a small run."""
    return [*OPTIONS.split(), "--coco_path", str(data), "--output_dir", str(output), *map(str, more)]


def torchrun(processes: int, *more: str) -> list[str]:
    """Return the start of a command that runs main.py several times."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *more]
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "main.py"]


def free_port() -> int:
    """Return a TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in the repository, its output in a file, in a process group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            arguments,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], log: Path, timeout: float = 240) -> str:
    """Wait for the end and return the output; a process that does not end is killed with all its children.

    Raises:
        AssertionError: it did not end in time.
    """
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        kill(process)
        raise AssertionError(f"no end after {timeout} s:\n{log.read_text()[-3000:]}") from error
    return log.read_text()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, its group, and the workers of a launcher, which have groups of their own."""
    children = workers(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        os.kill(child, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], Any], timeout: float = 180, interval: float = 0.05) -> Any:
    """Return the first true value of a condition.

    Raises:
        AssertionError: it does not come true in time.
    """
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(interval)
    raise AssertionError(f"nothing happened for {timeout} s")


def workers(launcher: int) -> list[int]:
    """Return the process ids of a launcher's children that run main.py."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"main.py" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def steps_saved(output: Path) -> int:
    """Return the optimizer steps in the newest checkpoint, 0 where there is none yet."""
    try:
        return int(load_checkpoint(output / "checkpoint.pth")["step"])
    except CheckpointError:  # none yet, or the older one was renamed and the new one has not got its name
        return 0


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the newest checkpoints of two runs bit for bit.

    Raises:
        AssertionError: they differ.
    """
    first, second = (load_checkpoint(folder / "checkpoint.pth") for folder in (one, other))
    assert (first["step"], first["epoch"]) == (second["step"], second["epoch"])
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
