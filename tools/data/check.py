"""List everything that is wrong or remarkable in a COCO data set.

Errors make training stop, or learn or measure something wrong; remarks are worth knowing. The exit code is 1 when there
are errors (with --strict: or remarks), else 0, and 2 for a wrong command line.

Examples::

    python -m tools.dataset check --coco_path data/mine
    python -m tools.dataset check labels.json --images pictures --show 20 --json problems.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tools.data.check_boxes import check_boxes
from tools.data.check_entries import SplitContent, read_split
from tools.data.check_pictures import check_pictures
from tools.data.check_splits import check_splits
from tools.data.kinds import KINDS, Problem
from tools.data.layout import SplitPaths, add_source_arguments, chosen_splits, write_json

HELP = "list every problem of a data set"


@dataclass
class CheckResult:
    """What a check found.

    Attributes:
        splits: what was read.
        problems: all of them, errors first, grouped by kind.
    """

    splits: list[SplitContent]
    problems: list[Problem]

    @property
    def errors(self) -> list[Problem]:
        """Problems that make training stop, or learn or measure something wrong."""
        return [problem for problem in self.problems if KINDS[problem.kind].is_error]

    @property
    def remarks(self) -> list[Problem]:
        """The other problems."""
        return [problem for problem in self.problems if not KINDS[problem.kind].is_error]


def check_data_set(splits: Sequence[SplitPaths], *, read_images: bool = True, decode: bool = False) -> CheckResult:
    """Check one annotation file, or two that are trained and evaluated on.

    Args:
        splits: one or two.
        read_images: read the picture files: header, size, sha256.
        decode: decode every picture too, which finds damage in the middle of files.
    """
    contents, problems = [], []
    for paths in splits:
        content, found = read_split(paths)
        if read_images and paths.image_folder is not None and content.images:
            found += check_pictures(content, paths.image_folder, decode=decode)
        problems += found + check_boxes(content)
        contents.append(content)
    if len(contents) == 2:
        problems += check_splits(*contents)
    order = {kind: place for place, kind in enumerate(KINDS)}
    return CheckResult(contents, sorted(problems, key=lambda problem: order[problem.kind]))


def format_report(result: CheckResult, *, show: int = 5) -> str:
    """Lay out what a check found: what was read, then the problems by kind.

    Args:
        result: of `check_data_set`.
        show: problems written out per kind.
    """
    lines = []
    for split in result.splits:
        lines.append(
            f"{split.file}: {len(split.images)} images, {len(split.annotations)} annotations, "
            f"{len(split.categories)} categories; {_pictures_read(split)}"
        )
    for title, problems in (("errors", result.errors), ("remarks", result.remarks)):
        if problems:
            lines += ["", f"== {title} =="]
        for kind, group in groupby(problems, key=lambda problem: problem.kind):
            lines += _format_kind(kind, list(group), show, len(result.splits) > 1)
    lines += ["", f"{_count(len(result.errors), 'error')}, {_count(len(result.remarks), 'remark')}"]
    return "\n".join(lines)


def _pictures_read(split: SplitContent) -> str:
    if not split.pictures:
        return "no picture read"
    return f"{sum(not picture.is_missing for picture in split.pictures.values())} pictures read (size, sha256)"


def _format_kind(kind: str, problems: list[Problem], show: int, name_file: bool) -> list[str]:
    lines = ["", f"{len(problems)} x {KINDS[kind].title} [{kind}]"]
    for problem in problems[:show]:
        file = Path(problem.file).name if name_file and problem.where else "" if problem.where else problem.file
        lines.append("    " + ": ".join(part for part in (file, problem.where, problem.detail) if part))
    if len(problems) > show:
        lines.append(f"    and {len(problems) - show} more (--show {len(problems)} lists all)")
    return [*lines, f"    -> {KINDS[kind].remedy}"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check`."""
    add_source_arguments(parser)
    parser.add_argument("--show", default=5, type=int, metavar="N", help="problems written out per kind (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all problems to a JSON file")
    parser.add_argument("--no_images", action="store_true", help="read the annotation files only")
    parser.add_argument("--decode", action="store_true", help="decode every picture whole, as training does; slow")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for remarks too")


def main(args: argparse.Namespace) -> int:
    """Print the report; return the exit status."""
    start = time.monotonic()
    result = check_data_set(chosen_splits(args), read_images=not args.no_images, decode=args.decode)
    print(f"{format_report(result, show=args.show)} ({time.monotonic() - start:.1f} s)")
    if args.json is not None:
        write_json([problem.as_json() for problem in result.problems], args.json)
        print(f"wrote {args.json}")
    return int(bool(result.errors or (args.strict and result.remarks)))
