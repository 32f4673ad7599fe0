"""Look into a trained detector: `python -m tools.visualize {anchors,attention,denoising,instability} --help`.

A checkpoint tells its own model. Options of main.py for files that do not, or that shall win over the file, stand
behind `--`, e.g. `-- -m dab_detr` or `-- --box_noise_scale 0.8`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from datasets import DatasetError
from tools.visualization import anchors, attention, denoising, instability
from tools.visualization.drawing import output_path
from util.errors import CheckpointError, OptionError

# Subcommand -> (module with add_arguments(parser) and run(options, model_options), what it draws).
PICTURES = {
    "anchors": (anchors, "anchors and boxes of the best queries, layer by layer"),
    "attention": (attention, "where queries look: attention weights or sampling points, layer by layer"),
    "denoising": (denoising, "known objects, noised boxes and what the model makes of them"),
    "instability": (instability, "how much the matching changed from epoch to epoch"),
}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.visualize", description=__doc__, formatter_class=as_written)
    subcommands = parser.add_subparsers(dest="kind", required=True)
    for kind, (module, help_text) in PICTURES.items():
        own = subcommands.add_parser(kind, help=help_text, description=module.__doc__, formatter_class=as_written)
        if kind != "instability":
            own.add_argument("checkpoint", metavar="CHECKPOINT", help="file, or https address, of a trained detector")
        module.add_arguments(own)
        own.add_argument("--output", type=output_path, required=True, metavar="FILE", help="picture, .png or .svg")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture that the command line names; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = build_parser()
    options = parser.parse_args(arguments[:split])
    try:
        PICTURES[options.kind][0].run(options, arguments[split + 1 :])
    except (OptionError, CheckpointError, DatasetError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
