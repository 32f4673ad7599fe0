"""Draw loss and AP curves of one or several runs.

Example::

    python -m tools.plot outputs/demo outputs/demo-matching --output compare.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.plots import plot_logs


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folder with a log.txt")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG", help="picture to write")
    options = parser.parse_args(argv)
    missing = [str(folder) for folder in options.folders if not (folder / "log.txt").exists()]
    if missing:
        parser.error(f"no log.txt in {', '.join(missing)}: pass output folders of main.py")
    plot_logs(options.folders, options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
