"""Run every measurement of docs/performance.md, one after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from models.ops.library import FOLDER

# What stands in the tables; plots of growing sizes are made apart, and so is compilation, which waits for a compiler.
KINDS = ("ops", "attention", "loss", "inference", "train", "data", "eval", "model")
MODEL = "dn_dab_deformable_detr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.add_argument("--coco_path", required=True, help="data folder; the input pipeline reads its train split")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="only these")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark"), help="where the JSON files go")


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run all; return 0 when all went well. `arguments` are what `args` was parsed from."""
    args.folder.mkdir(parents=True, exist_ok=True)
    own = {"data": ["--coco_path", args.coco_path], "model": ["-m", MODEL]}
    codes = {}
    for kind in args.kinds:
        print(f"\n== {kind} ==", flush=True)
        command = [sys.executable, str(FOLDER.parents[1] / "tools/benchmark.py"), kind, *own.get(kind, [])]
        codes[kind] = subprocess.run([*command, "--json", str(args.folder / f"{kind}.jsonl")]).returncode
    failed = [kind for kind, code in codes.items() if code]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return max(codes.values())
