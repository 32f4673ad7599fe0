"""What a run of several processes survives, and that its numbers are those of one process."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import (
    assert_same_weights,
    command,
    finish,
    free_port,
    kill,
    start,
    steps_saved,
    torchrun,
    wait_until,
    workers,
    write_pictures,
)
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", num_train=12)


def train(processes: int, data: Path, output: Path, *more: Any, status: int = 0) -> str:
    """Run main.py to its end, under torchrun for several processes; return what it said."""
    log = output.with_name(f"{output.name}.log")
    launcher = [sys.executable, "main.py"] if processes == 1 else torchrun(processes)
    process = start([*launcher, *command(data, output, *more)], log)
    text = finish(process, log)
    assert process.returncode == status, text[-3000:]
    return text


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(2, data, folder, "--epochs", 2)
    return folder


@pytest.mark.parametrize(
    "options", [(), ("--use_dn", "--dn_normalizer", "global", "--dn_mask_padding")], ids=["matching", "denoising"]
)
def test_two_processes_equal_one_after_fifty_steps(tmp_path: Path, options: tuple[str, ...]) -> None:
    # AdamW divides by the size of the gradient, so that rounding in gradients near zero grows to a part of the rate:
    # a lower rate than the default keeps it below the bound.
    more = ["4", *options, "--lr", "1e-5"]
    files = [tmp_path / "one.pth", tmp_path / "two.pth"]
    module = ["-m", "tests.drills.equal_numbers"]
    launchers = [[sys.executable], torchrun(2)[:-1]]
    for launcher, file in zip(launchers, files, strict=True):
        log = file.with_suffix(".log")
        process = start([*launcher, *module, str(file), *more], log)
        text = finish(process, log)
        assert process.returncode == 0, text[-3000:]
    one, two = (torch.load(file, weights_only=True) for file in files)
    for name, value in one["model"].items():
        assert (value - two["model"][name]).abs().max() <= 1e-6, name
    assert two["stats"]["loss"] == pytest.approx(one["stats"]["loss"], rel=1e-6)


def test_evaluation_counts_each_image_once_and_does_not_depend_on_the_number_of_processes(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    records = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        train(processes, data, folder, "--eval", "--save_results", "--resume", undisturbed / "checkpoint.pth")
        records.append(json.loads((folder / "log.txt").read_text()))
        seen = [torch.load(path, weights_only=True)["image_id"] for path in sorted(folder.glob("results-*.pkl"))]
        # Three images on two processes: two and one.
        assert len(seen) == processes and sorted(image_id for ids in seen for image_id in ids) == [101, 102, 103]
    assert records[0]["test_coco_eval_bbox"] == records[1]["test_coco_eval_bbox"]
    assert records[0]["test_loss"] == pytest.approx(records[1]["test_loss"], rel=1e-6)


def test_killed_worker_under_torchrun_restarts_and_equals_the_undisturbed_run(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    more = ("--epochs", 2, "--resume", "auto", "--checkpoint_steps", 1)
    process = start([*torchrun(2, "--max-restarts", "3"), *command(data, output, *more)], log)
    wait_until(lambda: steps_saved(output) >= 2)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    text = finish(process, log)
    assert process.returncode == 0, text[-3000:]
    assert "exitcode: -9" in text and "resumed" in text
    assert_same_weights(undisturbed, output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_torchrun_saves_on_all_processes_and_equals_the_undisturbed_run(
    data: Path, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    handled = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2")
    more = ("--epochs", 2, "--resume", "auto", "--checkpoint_steps", 1)
    process = start([*torchrun(2, *handled), *command(data, output, *more)], log)
    wait_until(lambda: steps_saved(output) >= 1)
    os.kill(process.pid, number)
    text = finish(process, log)
    assert process.returncode != 0 and "stopping after step" in text, text[-3000:]
    train(2, data, output, "--epochs", 2, "--resume", "auto")
    assert_same_weights(undisturbed, output)


def test_signal_to_one_worker_stops_all_at_the_same_step(data: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    process = start([*torchrun(2), *command(data, output, "--epochs", 2, "--checkpoint_steps", 1)], log)
    wait_until(lambda: steps_saved(output) >= 1)
    os.kill(workers(process.pid)[-1], signal.SIGUSR2)
    text = finish(process, log)
    assert process.returncode != 0
    assert text.count("stopping after step") == 1 and "gone" not in text, text[-3000:]
    ranks = (output / "info.txt", output / "rank1.txt")
    stops = [[line.split(": ", 1)[1] for line in path.read_text().splitlines() if "stopping" in line] for path in ranks]
    assert stops[0] == stops[1] and len(stops[0]) == 1


def test_checkpoint_of_two_processes_resumes_on_one_and_on_four(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    log = tmp_path / "log"
    process = start([*torchrun(2), *command(data, output, "--epochs", 2, "--checkpoint_steps", 1)], log)
    wait_until(lambda: steps_saved(output) >= 2)
    kill(process)
    saved = load_checkpoint(output / "checkpoint.pth")
    images = saved["batches_done"] * 2
    for processes in (1, 4):
        folder = tmp_path / str(processes)
        text = train(processes, data, folder, "--epochs", 2, "--resume", output / "checkpoint.pth")
        assert f"was saved by 2 processes, there are {processes} now" in text
        assert ("the sample order of the epoch starts anew" in text) == bool(images % processes), text[-2000:]
        content = load_checkpoint(folder / "checkpoint.pth")
        remaining = 12 - images if images % processes == 0 else 12
        epochs_left = 2 - (saved["epoch"] + 1)
        assert content["step"] == saved["step"] + (remaining + 12 * (epochs_left - 1)) // processes
        assert content["epoch"] == 1 and len(content["rng"]) == processes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_process_ends_the_others_with_a_message(data: Path, tmp_path: Path, number: int) -> None:
    output = tmp_path / "run"
    address = ["--world_size", "2", "--dist_url", f"tcp://127.0.0.1:{free_port()}", "--dist_timeout", "0.1"]
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    more = ("--epochs", 1000, "--checkpoint_steps", 1)
    pair = [
        start([sys.executable, "main.py", *command(data, output, *more), *address, "--rank", str(rank)], logs[rank])
        for rank in range(2)
    ]
    wait_until(lambda: steps_saved(output) >= 1)
    os.kill(pair[1].pid, number)
    try:
        # The timeout is six seconds.
        text = finish(pair[0], logs[0], timeout=60)
    finally:
        os.kill(pair[1].pid, signal.SIGKILL)
        pair[1].wait()
    assert pair[0].returncode == 1
    last = text.strip().splitlines()[-1]
    assert last.startswith("main.py: error (process 0): another process of the run is gone"), text[-3000:]
    # No child is left, dead or alive.
    assert not workers(pair[0].pid)


def damaged_copy(data: Path, root: Path, *names: str) -> Path:
    """Return a copy of the data set whose named training pictures are cut off."""
    (root / "train2017").mkdir(parents=True)
    for part in ("annotations", "val2017"):
        (root / part).symlink_to(data / part)
    for path in (data / "train2017").iterdir():
        content = path.read_bytes()
        (root / "train2017" / path.name).write_bytes(content[:200] if path.name in names else content)
    return root


def test_error_of_another_process_reaches_the_console_with_its_number(data: Path, tmp_path: Path) -> None:
    # Each process reads every picture of its half; one of them meets the damaged one.
    broken = damaged_copy(data, tmp_path / "data", "5.png")
    text = train(2, broken, tmp_path / "run", "--epochs", 1, status=1)
    lines = [line for line in text.splitlines() if line.startswith("main.py: error (process ")]
    assert any("5.png (image id 5)" in line for line in lines), text[-3000:]


def test_bad_pictures_are_counted_over_all_processes(data: Path, tmp_path: Path) -> None:
    broken = damaged_copy(data, tmp_path / "data", "3.png", "5.png", "8.png")
    text = train(2, broken, tmp_path / "run", "--epochs", 1, "--skip_bad_images", "--num_workers", 1)
    assert json.loads((tmp_path / "run" / "log.txt").read_text())["train_bad_images"] == 3
    assert all(f"{number}.png (image id {number})" in text for number in (3, 5, 8))


def test_old_launcher_of_torch_passes_a_local_rank(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    launcher = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
    process = start([*launcher, "main.py", *command(data, tmp_path / "run", "--epochs", 1)], log)
    text = finish(process, log)
    assert process.returncode == 0, text[-3000:]
    assert len(load_checkpoint(tmp_path / "run" / "checkpoint.pth")["rng"]) == 2
