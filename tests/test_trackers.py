"""Trackers: what TensorBoard, Weights & Biases and MLflow get. The latter two are stand-ins that record calls, and the
real packages as well where they are installed.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

import main
from tests.runs import command, write_pictures
from util.errors import OptionError
from util.trackers import MlflowTracker, TensorBoardTracker, Trackers, WandbTracker, open_trackers


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "p.png")
    return tmp_path / "p.png"


def options(**changes: Any) -> argparse.Namespace:
    """Return the options that `open_trackers` reads, and one more."""
    chosen = {"tensorboard": False, "wandb_project": None, "mlflow_experiment": None, "mlflow_uri": None, "lr": 0.1}
    return argparse.Namespace(**{**chosen, **changes})


class WandbError(Exception):
    """Stands for wandb.Error."""


class WandbStub(types.ModuleType):
    """Records what a run of wandb gets."""

    Error = WandbError
    Image = staticmethod(lambda path: f"image {Path(path).name}")

    def __init__(self, fails: bool = False) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def init(self, **arguments: Any) -> Any:
        if self.fails:
            raise WandbError("no key")
        self.calls.append(("init", arguments))
        run = argparse.Namespace(id=arguments["id"] or "new-id", config=argparse.Namespace())
        run.define_metric = lambda *names, **more: None
        run.log = lambda values: self.calls.append(("log", values))
        run.finish = lambda exit_code: self.calls.append(("finish", exit_code))
        run.config.update = lambda values, allow_val_change: self.calls.append(("config", values))
        return run


class MlflowError(Exception):
    """Stands for mlflow.MlflowException."""


class MlflowStub(types.ModuleType):
    """Records what a client of mlflow gets; experiments and runs are numbered."""

    MlflowException = MlflowError
    entities = argparse.Namespace(
        Param=lambda *values: values, Metric=lambda name, value, time, step: (name, value, step)
    )

    def __init__(self, fails: bool = False) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []
        self.params: dict[str, str] = {}
        self.fails = fails

    def MlflowClient(self, tracking_uri: str) -> Any:
        if self.fails:
            raise MlflowError("no server")
        self.calls.append(("client", tracking_uri))
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str, location: str | None) -> str:
        self.calls.append(("experiment", name, location))
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("run", experiment, run_name))
        return argparse.Namespace(info=argparse.Namespace(run_id="run-1"))

    def get_run(self, run_id: str) -> Any:
        return argparse.Namespace(data=argparse.Namespace(params=self.params))

    def __getattr__(self, name: str) -> Any:
        if name not in ("update_run", "log_batch", "log_image", "set_terminated"):
            raise AttributeError(name)
        return lambda *values, **named: self.calls.append((name, *values, named))


def install(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> Any:
    """Put a stand-in in the place of a package."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return module


def test_wandb_gets_options_numbers_and_pictures(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = install(monkeypatch, WandbStub())
    for resumed in (False, True):
        with open_trackers(options(wandb_project="cells"), tmp_path, resumed=resumed) as trackers:
            trackers.log_scalars({"train/loss": 1.5}, 3)
            trackers.log_picture("predictions", picture, 3)
    first, second = (arguments for name, arguments in stub.calls if name == "init")
    assert first["project"] == "cells" and first["id"] is None and first["name"] == tmp_path.name
    assert second["id"] == "new-id"  # the resumed run goes on in the same history
    assert ("log", {"train/loss": 1.5, "epoch": 3}) in stub.calls
    assert ("log", {"predictions": "image p.png", "epoch": 3}) in stub.calls
    assert next(values for name, values in stub.calls if name == "config")["lr"] == 0.1
    assert stub.calls[-1] == ("finish", 0)


def test_mlflow_gets_options_numbers_and_pictures(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = install(monkeypatch, MlflowStub())
    with open_trackers(options(mlflow_experiment="cells"), tmp_path, resumed=False) as trackers:
        trackers.log_scalars({"train/loss": 1.5}, 3)
        trackers.log_picture("predictions", picture, 3)
    assert stub.calls[0] == ("client", f"sqlite:///{tmp_path / 'mlflow.db'}")
    batches = [call[-1] for call in stub.calls if call[0] == "log_batch"]
    assert ("lr", "0.1") in batches[0]["params"] and batches[1] == {"metrics": [("train/loss", 1.5, 3)]}
    assert any(call[0] == "log_image" and call[-1] == {"artifact_file": "predictions/epoch_0003.png"}
               for call in stub.calls)  # fmt: skip
    assert stub.calls[-1] == ("set_terminated", "run-1", {"status": "FINISHED"})
    stub.calls.clear()
    stub.params["lr"] = "0.1"
    with (
        pytest.raises(KeyboardInterrupt),
        open_trackers(options(mlflow_experiment="cells", mlflow_uri="http://x"), tmp_path, resumed=True),
    ):
        raise KeyboardInterrupt
    names = [call[0] for call in stub.calls]
    assert stub.calls[:2] == [("client", "http://x"), ("experiment", "cells", None)]
    assert "run" not in names
    assert all(name != "lr" for call in stub.calls if call[0] == "log_batch" for name, _ in call[-1]["params"])
    assert stub.calls[-1] == ("set_terminated", "run-1", {"status": "FAILED"})


@pytest.mark.parametrize(
    ("chosen", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"wandb_project": "x"}, "wandb"), ({"mlflow_experiment": "x"}, "mlflow")],
)
def test_missing_package_is_one_sentence(
    chosen: dict[str, Any], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=f"pip install {package}"):
        open_trackers(options(**chosen), tmp_path, resumed=False)


def test_tracker_that_cannot_start_stops_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, WandbStub(fails=True))
    with pytest.raises(OptionError, match=r"no key.*wandb login"):
        open_trackers(options(wandb_project="x"), tmp_path, resumed=False)
    install(monkeypatch, MlflowStub(fails=True))
    with pytest.raises(OptionError, match="no server"):
        open_trackers(options(mlflow_experiment="x"), tmp_path, resumed=False)


class Recorder:
    """A tracker that remembers steps and fails at one of them."""

    opened: ClassVar[list[Recorder]] = []

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at, self.scalars, self.pictures, self.closed = fails_at, {}, [], []  # type: ignore[var-annotated]

    def log_options(self, options: Any) -> None:
        self.options = dict(options)

    def log_scalars(self, values: Any, step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("server away")
        self.scalars[step] = values

    def log_picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self.pictures.append((name, step, image.size))

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


def test_tracker_that_fails_later_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    one, other = Recorder(fails_at=1), Recorder()
    with Trackers([one, other]) as trackers:
        for step in range(3):
            trackers.log_scalars({"a": step}, step)
    assert list(one.scalars) == [0, 2] and list(other.scalars) == [0, 1, 2]
    assert "Recorder: server away; training goes on" in caplog.text and one.closed == other.closed == [False]


def test_training_sends_numbers_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("util.trackers.TensorBoardTracker", lambda folder: recorder)
    data, output = write_pictures(tmp_path / "data", num_train=2, num_val=1), tmp_path / "out"
    more = ("--epochs", 5, "--tensorboard", "--log_pictures_every", 2)
    assert main.run_command_line(command(data, output, *more)) == 0
    assert list(recorder.scalars) == [0, 1, 2, 3, 4] and recorder.closed == [False]
    assert {"train/loss", "test/AP50", "train/lr"} <= set(recorder.scalars[0])
    assert recorder.options["modelname"] == "dn_dab_detr"
    # Every second epoch, and the last.
    assert [(name, step) for name, step, _ in recorder.pictures] == [("predictions", step) for step in (1, 3, 4)]
    assert len((output / "log.txt").read_text().splitlines()) == 5


def test_no_tracker_and_no_picture_without_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not open_trackers(options(), tmp_path, resumed=False)
    assert not open_trackers(options(tensorboard=True), None, resumed=False)
    monkeypatch.setattr("util.trackers.is_main_process", lambda: False)
    assert not open_trackers(options(tensorboard=True), tmp_path, resumed=False)
    assert list(tmp_path.iterdir()) == []


def test_real_tensorboard_reads_what_was_written(tmp_path: Path, picture: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path / "events")
    tracker.log_options({"lr": 0.1})
    tracker.log_scalars({"train/loss": 1.5}, 3)
    tracker.log_picture("predictions", picture, 3)
    tracker.close(failed=False)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5)]
    image = events.Images("predictions")[0]
    assert (image.step, image.width, image.height) == (3, 8, 6)
    assert "options/text_summary" in events.Tags()["tensors"]


def test_real_wandb_writes_offline(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resumed in (False, True):
        tracker = WandbTracker("cells", tmp_path, resumed=resumed)
        tracker.log_options({"lr": 0.1})
        tracker.log_scalars({"train/loss": 1.5}, int(resumed))
        tracker.log_picture("predictions", picture, int(resumed))
        ids.append(tracker._run.id)
        assert tracker._run.summary["train/loss"] == 1.5
        tracker.close(failed=False)
    assert ids[0] == ids[1] == (tmp_path / "wandb_run_id.txt").read_text()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


def test_real_mlflow_keeps_one_run(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # mlflow-skinny leaves it out
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for step, resumed in enumerate((False, True)):
        tracker = MlflowTracker("cells", None, tmp_path, resumed=resumed)
        tracker.log_options({"lr": 0.1, "epochs": step})
        tracker.log_scalars({"train/loss": 1.5}, step)
        tracker.log_picture("predictions", picture, step)
        tracker.close(failed=False)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run((tmp_path / "mlflow_run_id.txt").read_text())
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.1", "epochs": "0"}
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [0, 1]
    names = {path.name for path in (tmp_path / "mlflow_files").rglob("*.png")}
    assert names == {"epoch_0000.png", "epoch_0001.png"}
