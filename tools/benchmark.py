"""Measure the speed and memory of parts of this codebase: `python tools/benchmark.py ops --help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

# Subcommand -> what it measures; `tools/benchmarks/<name>.py` has add_arguments(parser) and main(args, arguments).
KINDS = {
    "ops": "multi-scale deformable attention: all backends side by side",
    "data": "the training input pipeline against the official one",
    "eval": "COCO evaluation against pycocotools",
    "model": "a detector: parameters, multiply-adds, latency, memory",
    "inference": "detectors against those of Hugging Face transformers, same weights",
    "attention": "encoder and decoder attention against explicit softmax attention: time and saved memory",
    "scaling": "inference as images, queries and classes grow, with plots",
    "loss": "matching and losses: all layers at once against layer by layer",
    "train": "a training step: speed, launched operations, synchronisations, memory",
    "compile": "detectors compiled by torch.compile against eager ones: inference and training steps",
    "scaling_train": "a training step as batch, objects and denoising groups grow",
    "all": "all of these but the growing and the compiled ones, one after the other",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that the command line names; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__)
    subcommands = parser.add_subparsers(dest="kind", required=True)
    # Imported late: a script first has to say where the repository is.
    modules = {kind: importlib.import_module(f"tools.benchmarks.{kind}") for kind in KINDS}
    for kind, help_text in KINDS.items():
        modules[kind].add_arguments(subcommands.add_parser(kind, help=help_text))
    args = parser.parse_args(arguments)
    return modules[args.kind].main(args, arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
