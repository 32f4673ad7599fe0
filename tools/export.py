"""Export a trained detector for other programs, and check the file against PyTorch at once.

    python -m tools.export checkpoint.pth --output model.onnx
    python -m tools.export checkpoint.pth --format torch_export --output model.pt2
    python -m tools.export checkpoint.pth --postprocess --output model.onnx -- -m dab_detr --num_queries 300

The file takes pictures with values from 0 to 1 in any number and size. Behind `--` stand options of main.py for
checkpoints that do not say which model they hold. See docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from datasets import DatasetError
from tools.benchmarks.compare import compare
from tools.convert_checkpoint import KEPT_OPTIONS
from tools.detector import Detector, load_detector
from tools.exporting import trace, verify
from tools.exporting.wrapper import ExportableDetector
from util.errors import CheckpointError, ExportError, OptionError

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
RUNTIMES = {"onnx": "ONNX Runtime", "torch_export": "torch.export"}


def main(argv: Sequence[str] | None = None) -> int:
    """Export one checkpoint; return the exit status, after one sentence on stderr when something is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = _parser().parse_args(arguments[:split])
    try:
        check_arguments(args)
        detector = load_detector(args.checkpoint, options=arguments[split + 1 :])
        record = export(detector, args)
    except (CheckpointError, OptionError, DatasetError, ExportError) as error:
        sys.stderr.write(f"export: error: {error}\n")
        return 1
    if args.json is not None:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="file, folder or address, as for tools.convert_checkpoint")
    parser.add_argument("--format", choices=SUFFIXES, default="onnx")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="model.onnx or model.pt2")
    parser.add_argument("--no_mask", action="store_true", help="leave out the padding mask: all pictures fill a batch")
    parser.add_argument("--postprocess", action="store_true", help="give scores, labels and boxes in pixels")
    parser.add_argument(
        "--check_images", type=Path, nargs="+", default=[], metavar="PATH", help="pictures or folders of them"
    )
    parser.add_argument("--check_scale", type=int, metavar="N", help="short side of these (default: --eval_scale)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of either side; 0 measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file, one line per export")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ExportError for a command line that cannot be carried out, before anything is computed."""
    if args.output.suffix != SUFFIXES[args.format]:
        raise ExportError(f"--format {args.format} writes {SUFFIXES[args.format]} files, got --output {args.output}")
    if not args.output.parent.is_dir():
        raise ExportError(f"no folder {args.output.parent} for --output: create it first")
    if args.format == "onnx":
        trace.require_onnx()


def export(detector: Detector, args: argparse.Namespace) -> dict[str, Any]:
    """Trace, write, check and time one detector; the file appears under its name when it has passed the check.

    Returns:
        The figures printed, for --json.

    Raises:
        ExportError: the model cannot be traced, or the file is not equal to it.
    """
    postprocess: Any = detector.postprocess if args.postprocess else None
    smallest, largest = trace.side_limits(detector.model)
    scale = detector.args.eval_scale if args.check_scale is None else args.check_scale
    pictures = verify.read_pictures(args.check_images)
    sizes = {"scale": min(scale, largest), "max_size": min(detector.args.data_aug_max_size, largest)}
    batches = verify.make_batches(pictures, **sizes, smallest=smallest, padded=not args.no_mask)
    traced = trace.trace(ExportableDetector(detector.model, postprocess), with_mask=not args.no_mask)
    unchecked = args.output.with_name(f".unchecked_{args.output.name}")
    try:
        if args.format == "onnx":
            trace.write_onnx(traced, unchecked, metadata(detector))
            exported = verify.onnx_runner(unchecked)
        else:
            torch.export.save(traced.program, unchecked, extra_files=metadata(detector))
            exported = verify.program_runner(unchecked, traced.inputs)
        reference = verify.reference_runner(detector.model, postprocess)
        found = verify.check(reference, exported, batches, any_order=trace.is_two_stage(detector.model))
        unchecked.replace(args.output)
    finally:
        unchecked.unlink(missing_ok=True)
    record = {"model": detector.args.modelname, "format": args.format, "bytes": args.output.stat().st_size, **found}
    record |= {"sides": [smallest, largest], "inputs": traced.inputs, "outputs": traced.outputs}
    _print_check(args, record)
    if args.rounds:
        record |= _measure(reference, exported, batches[0], args)
    return record


def metadata(detector: Detector) -> dict[str, str]:
    """Return what a user of the file has to know, as JSON texts: classes, options, sizes of the pictures."""
    options = vars(detector.args)
    values = {
        "model": detector.args.modelname,
        "class_names": detector.class_names,
        "category_ids": detector.category_ids,
        "short_side": detector.args.eval_scale,
        "long_side": detector.args.data_aug_max_size,
        "num_results": getattr(detector.postprocess, "num_select", None),
        "options": {name: options[name] for name in KEPT_OPTIONS if options.get(name) is not None},
    }
    return {name: json.dumps(value) for name, value in values.items()}


def _print_check(args: argparse.Namespace, record: dict[str, Any]) -> None:
    smallest, largest = record["sides"]
    shapes = " and ".join(" x ".join(map(str, shape)) for shape in record["batches"])
    print(f"wrote {args.output} ({record['bytes'] / 1e6:.1f} MB): {record['model']}")
    print(f"inputs {', '.join(record['inputs'])}, sides of {smallest} to {largest} pixels")
    print(f"outputs {', '.join(record['outputs'])}")
    print(
        f"equal to PyTorch on {shapes}: boxes differ by at most {record['boxes']:.1e} of the picture, probabilities by "
        f"{record['probabilities']:.1e} ({verify.TOLERANCE:g} are allowed)"
    )


def _measure(reference: Any, exported: Any, batch: verify.Batch, args: argparse.Namespace) -> dict[str, Any]:
    name = RUNTIMES[args.format]
    calls = {"PyTorch": lambda: reference(batch), name: lambda: exported(batch)}
    ratio = compare(name, calls, rounds=args.rounds)
    print(
        f"{' x '.join(map(str, batch.images.shape))}, {torch.get_num_threads()} threads, medians of {args.rounds}: "
        f"PyTorch {ratio.baseline_value * 1e3:.0f} ms, {name} {ratio.ours_value * 1e3:.0f} ms; "
        f"{ratio.median:.2f} times as fast ({ratio.smallest:.2f} to {ratio.largest:.2f})"
    )
    return {"pytorch_seconds": ratio.baseline_value, "seconds": ratio.ours_value, "ratio": ratio.median}


if __name__ == "__main__":
    raise SystemExit(main())
