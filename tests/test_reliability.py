"""What a run survives: signals, kills, full disks, damaged files, dead loading processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from datasets.coco import CocoDetection
from tests.runs import REPOSITORY, assert_same_weights, command, finish, start, wait_until, write_pictures
from util.checkpoint import load_checkpoint, load_newest, save_latest
from util.distributed import DelayedVote, lost_process
from util.run_state import RunState
from util.signals import StopRequested, StopSignals


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", num_train=6)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main.run_command_line(command(data, folder, "--epochs", 2)) == 0
    return folder


def signal_on_read(monkeypatch: pytest.MonkeyPatch, split: str, read: int, number: int) -> None:
    """Let this process get a signal when it reads its n-th picture of a split."""
    original, reads = CocoDetection._read, [0]

    def read_and_signal(self: CocoDetection, index: int):  # type: ignore[no-untyped-def]
        if self.folder.folder.name == f"{split}2017":
            reads[0] += 1
            if reads[0] == read:
                os.kill(os.getpid(), number)
        return original(self, index)

    monkeypatch.setattr(CocoDetection, "_read", read_and_signal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_finishes_the_step_and_the_resumed_run_equals_the_undisturbed_one(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        # The ninth picture of six per epoch: step 3 of epoch 1.
        signal_on_read(patch, "train", 9, number)
        assert main.run_command_line(command(data, tmp_path, "--epochs", 2)) == 128 + number
    assert signal.getsignal(number) is before
    content = load_checkpoint(tmp_path / "checkpoint.pth")
    assert (content["epoch"], content["batches_done"], content["step"]) == (0, 3, 9)
    assert "stopping after step 9 (epoch 1, batch 3)" in (tmp_path / "info.txt").read_text()
    assert main.run_command_line(command(data, tmp_path, "--epochs", 2, "--resume", "auto")) == 0
    assert_same_weights(undisturbed, tmp_path)


def test_signal_at_the_last_step_stops_before_the_evaluation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_on_read(monkeypatch, "train", 6, signal.SIGUSR1)
    assert main.run_command_line(command(data, tmp_path, "--epochs", 1)) == 128 + signal.SIGUSR1
    assert not (tmp_path / "log.txt").exists()
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 6


def test_signal_in_evaluation_stops_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_on_read(monkeypatch, "val", 1, signal.SIGTERM)
    assert main.run_command_line(command(data, tmp_path, "--epochs", 1)) == 128 + signal.SIGTERM
    # The epoch is saved, only its evaluation is missing.
    content = load_checkpoint(tmp_path / "checkpoint.pth")
    assert (content["epoch"], content["step"]) == (0, 6) and not (tmp_path / "log.txt").exists()


def test_only_the_first_signal_counts_and_the_old_handlers_come_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with StopSignals() as stops:
            with pytest.raises(StopRequested) as stop, stops.deferred():
                os.kill(os.getpid(), signal.SIGUSR2)
                os.kill(os.getpid(), signal.SIGTERM)
                assert stops.received == signal.SIGUSR2
            assert stop.value.number == signal.SIGUSR2
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert seen == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_outside_of_training_raises_at_once() -> None:
    with StopSignals(), pytest.raises(StopRequested, match="SIGUSR1"):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)


def test_a_single_process_gets_its_own_vote_at_once() -> None:
    vote = DelayedVote(torch.device("cpu"))
    assert vote.cast(0, 1) == [0, 1] and vote.cast(10, 0) == [10, 0]


def test_minutes_between_checkpoints(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save = [], RunState.save

    def noting(self: RunState, *args, **options) -> None:  # type: ignore[no-untyped-def]
        saved.append(self.step)
        if self.step == 2:
            self.saved_at += 1000
        else:
            save(self, *args, **options)

    monkeypatch.setattr(RunState, "save", noting)
    # Every step takes longer than 0.006 seconds; after step 2 the clock says that the last save is in the future.
    assert main.run_command_line(command(data, tmp_path, "--epochs", 1, "--checkpoint_minutes", 1e-4)) == 0
    assert saved == [1, 2, 6]


SAVES_UNTIL_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from util.checkpoint import load_newest, save_latest
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
# Threads do not survive a fork: with a pool of them the child would wait for ever in its first tensor.
torch.set_num_threads(1)
content = {"model": {"w": torch.full((400_000,), -1.0)}, "epoch": -1}
took = []
for _ in range(4):
    began = time.monotonic()
    save_latest(content, folder)
    took.append(time.monotonic() - began)
random.seed(seed)
last, moments = -1, []
for round in range(20):
    child = os.fork()
    if child == 0:
        for epoch in range(last + 1, last + 1000):
            save_latest({"model": {"w": torch.full((400_000,), float(epoch))}, "epoch": epoch}, folder)
        os._exit(0)
    # Up to four saves: a disk may need a millisecond for one or half a second.
    time.sleep(0.005 + random.uniform(0, 4 * max(took)))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    moments.append(len(list(folder.glob(".*"))))
    found, path = load_newest(folder)
    assert found["epoch"] >= last and (found["model"]["w"] == found["epoch"]).all(), (round, path)
    last = found["epoch"]
print(last, sum(map(bool, moments)))
"""


def test_killed_while_saving_twenty_times_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    seed = str(random.randrange(1000))
    arguments = [sys.executable, "-c", SAVES_UNTIL_KILLED, str(tmp_path), seed]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    last, in_the_middle = map(int, done.stdout.split())
    # The kills did come while files were written.
    assert last > 0 and in_the_middle > 0
    assert "falling back" not in done.stderr


def test_files_of_killed_saves_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".new_checkpoint.pth.77.tmp").write_bytes(b"half a file")
    save_latest({"model": {}, "epoch": 0}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_falls_back_and_the_run_still_equals_the_undisturbed_one(
    data: Path, undisturbed: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run_command_line(command(data, tmp_path, "--epochs", 1, "--checkpoint_steps", 2)) == 0
    path = tmp_path / "checkpoint.pth"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 3]
    else:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))
    newest = load_newest(tmp_path)
    assert newest is not None and newest[1].name == "checkpoint_prev1.pth"
    assert main.run_command_line(command(data, tmp_path, "--epochs", 2, "--resume", "auto")) == 0
    assert "is damaged or no checkpoint" in capsys.readouterr().out
    assert_same_weights(undisturbed, tmp_path)


FULL_DISK = """
import resource, signal, sys
import main
from util.run_state import RunState
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = RunState.save
def save_with_little_room(self, *args, **options):
    # From the third step on no file may grow beyond 100 kB, as on a full disk.
    limit = 100_000 if self.step == 3 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(self, *args, **options)
RunState.save = save_with_little_room
sys.exit(main.run_command_line(sys.argv[1:]))
"""


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_full_disk_leaves_the_older_checkpoint(
    data: Path, undisturbed: Path, tmp_path: Path, on_save_error: str
) -> None:
    more = ("--epochs", 2, "--checkpoint_steps", 1, "--on_save_error", on_save_error)
    arguments = [sys.executable, "-c", FULL_DISK, *command(data, tmp_path, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    if on_save_error == "continue":
        assert done.returncode == 0, done.stderr
        assert "cannot write" in done.stdout and "Training goes on without this checkpoint" in done.stdout
        assert_same_weights(undisturbed, tmp_path)
        return
    assert done.returncode == 1
    assert done.stderr.startswith("main.py: error: cannot write") and "File too large" in done.stderr
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_dead_loading_process_is_one_sentence_with_its_picture(data: Path, tmp_path: Path) -> None:
    # A pipe nobody writes to: the worker that reads it is in the middle of this picture until it is killed.
    root = tmp_path / "data"
    (root / "train2017").mkdir(parents=True)
    for part in ("annotations", "val2017"):
        (root / part).symlink_to(data / part)
    for path in (data / "train2017").iterdir():
        if path.name != "4.png":
            (root / "train2017" / path.name).symlink_to(path)
    os.mkfifo(root / "train2017" / "4.png")
    log = tmp_path / "log"
    more = ("--epochs", 1, "--num_workers", 1)
    process = start([sys.executable, "main.py", *command(root, tmp_path / "out", *more)], log)

    def reader() -> int | None:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            # Waits in open() for somebody who writes.
            if Path(f"/proc/{child}/wchan").read_text() == "wait_for_partner":
                return int(child)
        return None

    try:
        os.kill(wait_until(reader, timeout=60), signal.SIGKILL)
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    output = finish(process, log)
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("main.py: error: loading process") and "4.png (image id 4)" in last, output
    assert "Killed" in last or "exited unexpectedly" in last


def test_stop_signals_to_all_processes_do_not_break_the_step(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    more = ("--epochs", 2, "--num_workers", 2, "--checkpoint_steps", 1)
    process = start([sys.executable, "main.py", *command(data, tmp_path / "out", *more)], log)
    wait_until((tmp_path / "out" / "checkpoint.pth").exists)
    # As Slurm does: the loading processes get it too.
    os.killpg(process.pid, signal.SIGTERM)
    output = finish(process, log)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopping after step" in output and "DataLoader" not in output and "Traceback" not in output
    load_checkpoint(tmp_path / "out" / "checkpoint.pth")


def test_errors_of_a_lost_process_are_told_from_others() -> None:
    assert "--resume auto" in (lost_process(RuntimeError("[gloo/pair.cc] Connection closed by peer [::1]")) or "")
    assert "Timed out" in (lost_process(RuntimeError("Timed out waiting 60000ms for recv operation")) or "")
    assert lost_process(RuntimeError("shape mismatch")) is None
