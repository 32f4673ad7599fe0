"""Curves and pictures of a training in TensorBoard, Weights & Biases and MLflow, where asked for.

`log.txt` holds the same numbers always: a tracker that fails in mid-training costs a warning, not the run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .distributed import is_main_process
from .errors import OptionError

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A place that keeps the history of runs."""

    def log_options(self, options: Mapping[str, Any]) -> None:
        """Take the options of the run."""

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of an epoch by name."""

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Take a picture file."""

    def close(self, *, failed: bool) -> None:
        """Write what is left; say whether the run failed."""


class TensorBoardTracker:
    """Event files in a folder.

    Raises:
        OptionError: the package is missing.
    """

    def __init__(self, folder: Path) -> None:
        _import("tensorboard", "--tensorboard")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def log_options(self, options: Mapping[str, Any]) -> None:
        """Write the options as a text."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in sorted(options.items()))
        self._writer.add_text("options", f"| option | value |\n|---|---|\n{rows}")

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Write a picture from a file."""
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """End the file, which knows no outcome."""
        self._writer.close()


class WandbTracker:
    """A run of a Weights & Biases project; offline with WANDB_MODE=offline.

    Args:
        project: its name.
        folder: output folder, for the package's files and the id of the run.
        resumed: go on with the run of that id.

    Raises:
        OptionError: the package is missing, or no run can be started.
    """

    def __init__(self, project: str, folder: Path, *, resumed: bool) -> None:
        self._wandb = _import("wandb", "--wandb_project")
        id_file = folder / "wandb_run_id.txt"
        try:
            self._run = self._wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=str(folder),
                id=_known_id(id_file) if resumed else None,
                resume="allow",
            )
        except self._wandb.Error as error:
            raise OptionError(
                f"--wandb_project {project}: {error}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        id_file.write_text(self._run.id)
        # Their own count of calls must rise, which that of a resumed epoch does not.
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def log_options(self, options: Mapping[str, Any]) -> None:
        """Write the options as the configuration of the run."""
        self._run.config.update(dict(options), allow_val_change=True)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name, over the epoch."""
        self._run.log({**values, "epoch": step})

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Write a picture from a file."""
        self._run.log({name: self._wandb.Image(str(path)), "epoch": step})

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """A run of an MLflow experiment.

    Args:
        experiment: its name.
        uri: server or data base; None takes MLFLOW_TRACKING_URI, else `mlflow.db` in the output folder.
        folder: output folder, which also keeps the id of the run.
        resumed: go on with the run of that id.

    Raises:
        OptionError: the package is missing, or no run can be started.
    """

    def __init__(self, experiment: str, uri: str | None, folder: Path, *, resumed: bool) -> None:
        mlflow = _import("mlflow", "--mlflow_experiment")
        self._entities = mlflow.entities
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        # Without a server pictures would go below the current folder.
        pictures = None if uri else (folder / "mlflow_files").resolve().as_uri()
        uri = uri or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        id_file = folder / "mlflow_run_id.txt"
        try:
            # The client keeps what it needs to itself; the package's functions share one active run per process.
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            known = self._client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self._client.create_experiment(experiment, pictures)
            self._run_id = _known_id(id_file) if resumed else None
            if self._run_id is None:
                self._run_id = self._client.create_run(number, run_name=folder.resolve().name).info.run_id
            else:
                self._client.update_run(self._run_id, status="RUNNING")
        # A data base without sqlalchemy, which the small package mlflow-skinny leaves out, is an ImportError.
        except (mlflow.MlflowException, ImportError) as error:
            raise OptionError(f"--mlflow_experiment {experiment} at {uri}: {error}") from error
        id_file.write_text(self._run_id)

    def log_options(self, options: Mapping[str, Any]) -> None:
        """Write the options; those a resumed run has already cannot change and stay."""
        known = self._client.get_run(self._run_id).data.params
        new = [self._entities.Param(name, str(value)[:500]) for name, value in options.items() if name not in known]
        # Servers refuse longer texts, and more at once.
        for first in range(0, len(new), 100):
            self._client.log_batch(self._run_id, params=new[first : first + 100])

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        now = round(time.time() * 1000)
        numbers = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=numbers)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Write a picture from a file, one per epoch."""
        with Image.open(path) as picture:
            self._client.log_image(self._run_id, picture, artifact_file=f"{name}/epoch_{step:04d}.png")

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


class Trackers:
    """Several trackers as one; what fails is told and skipped. False when there is none."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._each(lambda tracker: tracker.close(failed=error is not None))

    def log_options(self, options: Mapping[str, Any]) -> None:
        """Tell every tracker the options of the run."""
        self._each(lambda tracker: tracker.log_options(options))

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Tell every tracker the numbers of an epoch."""
        self._each(lambda tracker: tracker.log_scalars(values, step))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Send a picture file to every tracker."""
        self._each(lambda tracker: tracker.log_picture(name, path, step))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            try:
                action(tracker)
            # Whatever a foreign package raises when its server is away must not end days of training.
            except Exception as error:
                _log.warning("%s: %s; training goes on, log.txt has the numbers", type(tracker).__name__, error)


def open_trackers(args: argparse.Namespace, folder: Path | None, *, resumed: bool) -> Trackers:
    """Open what the options ask for and tell it the options; nothing on processes other than 0.

    Args:
        args: options.
        folder: output folder; None opens nothing.
        resumed: the run goes on, and so do its histories.

    Raises:
        OptionError: a package is missing, or a history cannot be started.
    """
    if folder is None or not is_main_process():
        return Trackers([])
    opened: list[Tracker] = []
    if args.tensorboard:
        opened.append(TensorBoardTracker(folder))
    if args.wandb_project:
        opened.append(WandbTracker(args.wandb_project, folder, resumed=resumed))
    if args.mlflow_experiment:
        opened.append(MlflowTracker(args.mlflow_experiment, args.mlflow_uri, folder, resumed=resumed))
    trackers = Trackers(opened)
    trackers.log_options(vars(args))
    return trackers


def _import(package: str, option: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise OptionError(f"{option} needs the package {package}: pip install {package}, or leave it out")
    return importlib.import_module(package)


def _known_id(file: Path) -> str | None:
    return file.read_text().strip() if file.is_file() else None
