"""Checkpoint files: atomic, safe to read, and clear about what is wrong with them."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from util.checkpoint import atomic_save, load_checkpoint, load_newest, model_weights, save_latest
from util.errors import CheckpointError

REPOSITORY = Path(__file__).resolve().parents[1]


def content(value: float = 1.0) -> dict[str, Any]:
    """Return the content of a small checkpoint."""
    return {"model": {"w": torch.full((1000,), value)}, "epoch": int(value)}


def test_saved_content_is_read_back(tmp_path: Path) -> None:
    atomic_save(content(3.0), tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["epoch"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_failing_write_leaves_the_older_file_and_no_other(tmp_path: Path) -> None:
    class Unpicklable:
        def __reduce__(self) -> Any:
            raise OSError(28, "No space left on device")

    atomic_save(content(1.0), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"cannot write .*a\.pth: No space left on device.*intact"):
        atomic_save({"model": Unpicklable()}, tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert load_checkpoint(tmp_path / "a.pth")["epoch"] == 1


def test_a_full_disk_is_one_sentence_and_the_older_file_intact(tmp_path: Path) -> None:
    atomic_save(content(1.0), tmp_path / "a.pth")
    # The largest file this process may write is smaller than the checkpoint: the write itself fails half way.
    program = f"""
import resource, signal, torch
from pathlib import Path
from util.checkpoint import atomic_save
from util.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    atomic_save({{"model": {{"w": torch.zeros(100000)}}}}, Path({str(tmp_path)!r}) / "a.pth")
except CheckpointError as error:
    raise SystemExit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert load_checkpoint(tmp_path / "a.pth")["epoch"] == 1


def test_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory"):
        atomic_save(content(), tmp_path / "no" / "a.pth")


def test_predecessors_are_kept_in_order(tmp_path: Path) -> None:
    for value in range(5):
        save_latest(content(value), tmp_path, keep=3)
    kept = {path.name: load_checkpoint(path)["epoch"] for path in tmp_path.iterdir()}
    assert kept == {"checkpoint.pth": 4, "checkpoint_prev1.pth": 3, "checkpoint_prev2.pth": 2}


def test_keep_one_keeps_one(tmp_path: Path) -> None:
    for value in range(2):
        save_latest(content(value), tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_an_official_file_with_a_namespace_loads(tmp_path: Path) -> None:
    official = {"model": {"module.w": torch.ones(1)}, "args": argparse.Namespace(lr=1.0)}
    torch.save(official, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert loaded["args"].lr == 1.0
    assert list(model_weights(loaded, "a.pth")) == ["w"]


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_a_file_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="could run code: refused"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_an_object_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}, "path": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(tmp_path / "a.pth")


def damage(path: Path, how: str) -> None:
    """Damage a file in place."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "text":
        data = bytearray(b"hello, this is no checkpoint")
    else:
        middle = len(data) // 2
        data[middle] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "flipped"])
def test_a_damaged_file_is_named(tmp_path: Path, how: str) -> None:
    atomic_save(content(), tmp_path / "a.pth")
    damage(tmp_path / "a.pth", how)
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_file_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no checkpoint /nowhere"):
        load_checkpoint("/nowhere/a.pth")


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="found only epoch"):
        model_weights({"epoch": 1}, "a.pth")
    assert list(model_weights({"w": torch.ones(1)}, "bare.pth")) == ["w"]


def test_newest_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in range(2):
        save_latest(content(value), tmp_path)
    damage(tmp_path / "checkpoint.pth", "truncated")
    found = load_newest(tmp_path)
    assert found is not None and found[1].name == "checkpoint_prev1.pth" and found[0]["epoch"] == 0
    assert "falling back" in caplog.text
    damage(tmp_path / "checkpoint_prev1.pth", "flipped")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        load_newest(tmp_path)


def test_newest_of_an_empty_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint0001_beforedrop.pth").write_bytes(b"")
    assert load_newest(tmp_path) is None


def test_an_address_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(url: str, path: str, progress: bool) -> None:
        fetched.append(url)
        torch.save(content(7.0), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        assert load_checkpoint("https://example.org/a.pth")["epoch"] == 7
    assert fetched == ["https://example.org/a.pth"]


def test_an_address_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, path: str, progress: bool) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(CheckpointError, match="Fetch it by hand"):
        load_checkpoint("https://example.org/a.pth")
    with pytest.raises(CheckpointError, match="https"):
        load_checkpoint("http://example.org/a.pth")


def test_a_plain_pickle_is_refused_or_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "a.pth")
