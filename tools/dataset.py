"""Check, convert, count, split and look at your own data: `python -m tools.dataset check --help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from datasets import DatasetError
from util.errors import OptionError

# Each is a room tools/data/<name>.py with HELP, add_arguments(parser) and main(args).
SUBCOMMANDS = ("check", "convert", "stats", "split", "preview")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m tools.dataset", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name in SUBCOMMANDS:
        room = importlib.import_module(f"tools.data.{name}")
        subparser = subparsers.add_parser(
            name,
            help=room.HELP,
            description=room.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        room.add_arguments(subparser)
        subparser.set_defaults(room=room)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand of the command line.

    Returns:
        0; 1 when the data is at fault, or `check` found errors; 2 when the command line is.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.room.main(args)
    except (DatasetError, OptionError) as error:
        sys.stderr.write(f"tools.dataset {args.subcommand}: error: {error}\n")
        return 2 if isinstance(error, OptionError) else 1


if __name__ == "__main__":
    sys.exit(main())
