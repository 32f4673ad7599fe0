"""Write one HTML page about one or several runs of main.py.

Example::

    python -m tools.report outputs/demo --output report.html
    python -m tools.report outputs/demo outputs/demo-matching --evaluate --output compare.html

The page needs no network. What a folder does not hold is left out with a sentence that says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import DatasetError
from tools.plot import check_folders
from tools.reporting.evaluation import evaluate_folder
from tools.reporting.page import write_report
from tools.reporting.runs import read_runs
from util.errors import CheckpointError, OptionError


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page named on the command line; return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    check_folders(parser, options.folders)
    if options.images < 1 or not 0 <= options.min_score <= 1:
        parser.error("expected --images of at least 1 and --min_score from 0 to 1")
    try:
        if options.evaluate:
            for folder in options.folders:
                print(f"evaluating {folder}", flush=True)
                evaluate_folder(folder, coco_path=options.coco_path, device=options.device)
        runs = read_runs(options.folders, coco_path=options.coco_path)
        write_report(runs, options.output, count=options.images, min_score=options.min_score)
    except (CheckpointError, DatasetError, OptionError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {options.output} ({options.output.stat().st_size / 2**20:.1f} MiB)")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folder with a log.txt")
    parser.add_argument("--output", required=True, type=Path, metavar="HTML", help="page to write")
    parser.add_argument(
        "--evaluate", action="store_true", help="evaluate checkpoint.pth of every folder first; writes eval/ there"
    )
    parser.add_argument("--coco_path", metavar="FOLDER", help="where the data lies, when not where the options say")
    parser.add_argument("--device", help="for --evaluate: cuda or cpu; default: that of the run")
    parser.add_argument("--images", type=int, default=8, help="how many of the worst images to show; default 8")
    parser.add_argument(
        "--min_score", type=float, default=0.3, help="detections below are left out of those images; default 0.3"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
