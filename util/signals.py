"""Signals that ask a run to stop: obeyed at once where nothing would be lost, else after the step and a checkpoint."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

# What Slurm, submitit, torchrun, Kubernetes and people send before they kill.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A process that a signal stopped ends with this plus the signal's number, as shells have it.
STATUS_BASE = 128


class StopRequested(BaseException):
    """A signal asked the run to stop.

    No Exception: code that turns failures into messages must let it pass, as it does with KeyboardInterrupt.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Context in which the first stop signal is remembered, and raised unless it was told to wait.

    Outside `deferred` the signal raises `StopRequested` wherever the main thread is. Inside it only sets `received`.
    Further signals change nothing: the run is stopping already. On leaving, whoever listened before listens again.

    Attributes:
        received: number of the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._is_deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait in a part that reads `received` itself; one that nobody obeyed is raised at its end.

        Raises:
            StopRequested: a signal came.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received:
            raise StopRequested(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = number
        if not self._is_deferred:
            raise StopRequested(number)
