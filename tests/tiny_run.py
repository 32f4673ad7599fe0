"""A data set and a trained checkpoint for the modules that name this one in `pytest_plugins`."""

from __future__ import annotations

from pathlib import Path

import pytest

import main
from tests.runs import command, write_pictures


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three pictures to train on and three to evaluate; categories 1 leaf and 2 brick are labels 0 and 1."""
    return write_pictures(tmp_path_factory.mktemp("tiny") / "data", num_train=3)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three steps with an average of the weights; return the checkpoint."""
    folder = tmp_path_factory.mktemp("tiny_run")
    argv = command(tiny_data, folder, "--epochs", 1, "--ema", "--ema_decay", 0.5, "--lr", 1e-3)
    assert main.run_command_line(argv) == 0
    return folder / "checkpoint.pth"
