"""Draw curves of one or several runs, as PNG, SVG or PDF by the suffix of the output.

Example::

    python -m tools.plot outputs/demo outputs/demo-matching --output compare.png
    python -m tools.plot outputs/demo --curves loss denoising ap lr speed memory --output curves.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.curves import DEFAULT_PANELS, PANELS
from util.errors import OptionError
from util.plots import plot_logs

FORMATS = (".png", ".svg", ".pdf")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folder with a log.txt")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture to write: .png, .svg, .pdf")
    parser.add_argument(
        "--curves",
        nargs="+",
        choices=PANELS,
        default=DEFAULT_PANELS,
        metavar="CURVE",
        help=f"what to draw, of {', '.join(PANELS)}; default: {' '.join(DEFAULT_PANELS)}",
    )
    options = parser.parse_args(argv)
    check_folders(parser, options.folders)
    if options.output.suffix not in FORMATS:
        parser.error(f"expected --output to end in {', '.join(FORMATS)}, got {options.output}")
    try:
        plot_logs(options.folders, options.output, options.curves)
    except (OptionError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {options.output}")
    return 0


def check_folders(parser: argparse.ArgumentParser, folders: Sequence[Path]) -> None:
    """End the program with a sentence when a folder has no log.txt or comes twice."""
    missing = [str(folder) for folder in folders if not (folder / "log.txt").is_file()]
    if missing:
        parser.error(f"no log.txt in {', '.join(missing)}: pass output folders of main.py")
    if len({folder.resolve() for folder in folders}) < len(folders):
        parser.error("a folder is named twice: pass each once")


if __name__ == "__main__":
    raise SystemExit(main())
