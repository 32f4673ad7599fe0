"""Measure the speed of parts of this codebase: `python tools/benchmark.py ops --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that the command line names; return the exit code."""
    from tools.benchmarks import model, ops  # Imported late: a script first has to say where the repository is.

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__)
    subcommands = parser.add_subparsers(dest="kind", required=True)
    ops.add_arguments(subcommands.add_parser("ops", help="multi-scale deformable attention: all backends side by side"))
    model.add_arguments(subcommands.add_parser("model", help="a detector: parameters, multiply-adds, latency, memory"))
    args = parser.parse_args(arguments)
    return model.main(args) if args.kind == "model" else ops.main(args, arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
