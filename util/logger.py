"""Where messages go: the console of process 0, a file per process, and one JSON line per epoch."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from termcolor import colored

from .errors import OptionError

# Lines of this logger repeat what the progress bar shows; they reach the log file only with --save_log.
METRIC_LOGGER = "metrics"
ERASE_LINE = "\r\x1b[K"
_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


def setup_logging(output_dir: Path | None, *, rank: int = 0, save_log: bool = False) -> None:
    """Send the messages of this process where they belong; may be called again.

    Process 0 writes to the console and to `info.txt`. Other processes write to `rankN.txt`, and only warnings and
    errors, with the rank in front, to the console.

    Args:
        output_dir: folder of the files, which exists; None writes none.
        rank: number of this process.
        save_log: metric lines go to `info.txt` too.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, (_Console, _LogFile)):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(logging.INFO)
    console = _Console(sys.stdout if rank == 0 else sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_ConsoleFormatter("" if rank == 0 else f"rank {rank}: "))
    root.addHandler(console)
    if output_dir is not None:
        file = _LogFile(output_dir / ("info.txt" if rank == 0 else f"rank{rank}.txt"), encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
        if not save_log:
            file.addFilter(lambda record: record.name != METRIC_LOGGER)
        root.addHandler(file)
    logging.captureWarnings(True)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object per line.

    Raises:
        OptionError: a line is no JSON; names it.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, line {number} is no JSON, perhaps cut off: remove that line") from error
    return records


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table in plain text, first column left, the others right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


class _LogFile(logging.FileHandler):
    pass


class _Console(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.isatty():
            if record.name == METRIC_LOGGER:
                return
            self.stream.write(ERASE_LINE)
        super().emit(record)


class _ConsoleFormatter(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__("%(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        clock = colored(self.formatTime(record, "%H:%M:%S"), "green")
        text = super().format(record)
        color = _COLORS.get(record.levelno)
        if color is not None:
            text = colored(f"{record.levelname.lower()}: {text}", color)
        return f"{clock} {self._prefix}{text}"
