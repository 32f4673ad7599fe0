"""Look at everything a training needs, and say what is wrong and how to mend it.

    python -m tools.doctor --coco_path data/coco --output_dir logs/run

One line per thing, marked ok, warning (works, but worse than it could) or error. The exit status is 1 when there is an
error. Nothing of the environment is printed but what concerns the training.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tools.checkup import packages
from tools.checkup.finding import ERROR, WARNING, Finding


def main(argv: Sequence[str] | None = None) -> int:
    """Examine and report; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco_path", help="data set to read, as for main.py")
    parser.add_argument("--label_mapping", default="ids", choices=("ids", "contiguous"), help="as for main.py")
    parser.add_argument("--output_dir", default="", help="folder to write to, as for main.py")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects instead of lines")
    args = parser.parse_args(argv)
    findings = examine(args)
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        report(findings)
    return int(any(finding.mark == ERROR for finding in findings))


def examine(args: argparse.Namespace) -> list[Finding]:
    """Look at every subject; one that breaks the examination itself becomes an error."""
    found = packages.examine()
    if any(each.mark == ERROR for each in found):
        # The other subjects need these packages themselves.
        return [*found, Finding(WARNING, "the rest", "not examined", "mend the packages above and start again")]
    subjects: dict[str, Callable[[], list[Finding]]] = {
        "machine": lambda: _checkup("machine").examine(),
        "operator": lambda: _checkup("operator").examine(),
        "data": lambda: _checkup("storage").examine_data(args.coco_path, args.label_mapping),
        "output": lambda: _checkup("storage").examine_output(args.output_dir),
    }
    for name, subject in subjects.items():
        try:
            found += subject()
        # Whatever a broken installation raises: the other subjects have to be heard all the same.
        except Exception as error:
            text = f"the examination broke off ({type(error).__name__}: {str(error).strip()[:300]})"
            found.append(Finding(ERROR, name, text, "mend the errors above first; if there are none, report this one"))
    return found


def _checkup(name: str) -> Any:
    # Imported late: these files need packages that may be broken.
    return importlib.import_module(f"tools.checkup.{name}")


def report(findings: Sequence[Finding]) -> None:
    """Print one line per finding, its remedy below, and a count."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.mark:8s} {finding.name:{width}s}  {finding.text}")
        if finding.remedy:
            print(f"{'':8s} {'':{width}s}  -> {finding.remedy}")
    errors, warnings = (sum(finding.mark == mark for finding in findings) for mark in (ERROR, WARNING))
    print(f"{len(findings)} things looked at: {errors} errors, {warnings} warnings")


if __name__ == "__main__":
    sys.exit(main())
