"""Draw how much the matching changed from epoch to epoch, of runs trained with --log_instability.

Example::

    python -m tools.visualize instability outputs/demo outputs/demo-matching --output instability.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.curves import read_log
from util.errors import OptionError
from util.plots import plot_logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folder with a log.txt")


def run(options: argparse.Namespace, model_options: Sequence[str]) -> None:
    """Draw what the command line asks for.

    Raises:
        OptionError: there is no log, or no score in any.
    """
    missing = [str(folder) for folder in options.folders if not (folder / "log.txt").exists()]
    if missing:
        raise OptionError(f"no log.txt in {', '.join(missing)}: pass output folders of main.py")
    if not any("test_instability" in record for folder in options.folders for record in read_log(folder)):
        raise OptionError("no run has logged test_instability in two epochs: train with --log_instability")
    plot_logs(options.folders, options.output, ["instability"])
