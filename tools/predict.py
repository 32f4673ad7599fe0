"""Detect objects in pictures and videos: `python -m tools.predict CHECKPOINT INPUT --output DIR`.

CHECKPOINT is a file of main.py, an official one, a .safetensors file of tools.convert_checkpoint, or the folder of a
Hugging Face DAB-DETR or Deformable DETR. It is enough: options, class names and picture size come from inside it. A
file that does not say which model it is gets options of main.py after `--`: `... -- -m dab_detr`.

INPUT is a picture, a video, a folder, or a pattern such as `shots/*.jpg`; several are fine. A file that cannot be
read is named at the end, all others are done, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import main as program
from datasets import DatasetError
from datasets.annotations import load_annotation_file, read_categories
from datasets.labels import LabelMap
from tools.prediction.inputs import Input, find_inputs
from tools.prediction.loading import detect, load, number_of_pictures
from tools.prediction.outputs import FORMATS, CocoWriter, CsvWriter, JsonLinesWriter, PictureWriter, Writer
from tools.prediction.video import video_package
from tools.predictor import Predictor
from util.errors import OptionError
from util.logger import setup_logging
from util.progress import track


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line before `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for what is written")
    parser.add_argument(
        "--save", nargs="+", default=["pictures", "json_lines"], choices=FORMATS, help="default: pictures json_lines"
    )
    parser.add_argument("--recursive", action="store_true", help="look into folders of folders")
    parser.add_argument("--score_threshold", default=0.3, type=float, help="leave out detections below (default 0.3)")
    parser.add_argument("--top_k", type=int, help="most detections per picture")
    parser.add_argument("--batch_size", default=1, type=int, help="pictures per forward pass (default 1)")
    parser.add_argument("--half", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--amp_dtype", choices=("float16", "bfloat16"), help="mixed precision in this type")
    parser.add_argument("--compile", action="store_true", help="generate code first (torch.compile), for many pictures")
    parser.add_argument("--device", default="cuda", help="the CPU is used when there is no GPU")
    parser.add_argument("--scale", type=int, help="short side of the picture; default: as in the run's evaluation")
    parser.add_argument("--max_size", type=int, help="longest side; default: as in the run's evaluation")
    parser.add_argument("--num_workers", default=4, type=int, help="threads that read and write pictures (default 4)")
    parser.add_argument(
        "--class_names", type=Path, metavar="FILE", help="text file, line N names label N from 0; or COCO annotations"
    )
    parser.add_argument(
        "--image_ids", type=Path, metavar="FILE", help="COCO file whose ids of the pictures --save coco takes"
    )
    parser.add_argument("--no_average", action="store_true", help="the weights even where there is an average (--ema)")
    parser.add_argument("--fail_fast", action="store_true", help="stop at the first file that cannot be read")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when a file could not be read or nothing could be done, with sentences on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = build_parser().parse_args(arguments[:split])
    setup_logging(None)
    try:
        failures = predict(args, arguments[split + 1 :])
    except Exception as error:
        text = f"cannot write: {error}" if isinstance(error, OSError) else program.user_message(error)
        if text is None:
            raise
        sys.stderr.write(f"predict: error: {text}\n")
        return 1
    if failures:
        lines = "".join(f"  {failure}\n" for failure in failures)
        sys.stderr.write(f"predict: {len(failures)} of the inputs could not be read to their end:\n{lines}")
    return 1 if failures else 0


def predict(args: argparse.Namespace, model_options: Sequence[str]) -> list[str]:
    """Do what the command line asks for; return a sentence for every file that could not be read.

    Raises:
        DatasetError, OptionError, CheckpointError: for the user. OSError: an output cannot be written.
    """
    if args.num_workers < 1:
        raise OptionError(f"expected --num_workers of at least 1, got {args.num_workers}")
    inputs = find_inputs(args.inputs, recursive=args.recursive, leave_out=args.output / "pictures")
    if any(source.is_video for source in inputs):
        video_package()
    image_ids = read_image_ids(args.image_ids, inputs) if args.image_ids else None
    predictor = build_predictor(args, model_options)
    failures: list[str] = []

    def fail(source: Input, error: DatasetError) -> None:
        # Reading a picture names it already.
        text = str(error) if str(error).startswith(str(source.path)) else f"{source.path}: {error}"
        if args.fail_fast:
            raise DatasetError(text) from error
        failures.append(text)

    args.output.mkdir(parents=True, exist_ok=True)
    done: Counter[str] = Counter()
    with ThreadPoolExecutor(args.num_workers) as pool, contextlib.ExitStack() as stack:
        writers = open_writers(args, predictor, image_ids, pool)
        for writer in writers:
            stack.callback(writer.close)
        results = detect(predictor, load(predictor, inputs, pool, args.num_workers + args.batch_size, fail))
        total = sum(map(number_of_pictures, inputs))
        tell: dict[str, Any] = {"describe": lambda: f"{done['objects']} objects", "every": max(1, min(50, total // 10))}
        for result in track(results, total=total, header="predict", **tell):
            done.update(pictures=1, objects=len(result.found))
            for writer in writers:
                writer.add(result)
    print(f"{done['pictures']} pictures, {done['objects']} objects: {', '.join(args.save)} in {args.output}")
    return failures


def build_predictor(args: argparse.Namespace, model_options: Sequence[str]) -> Predictor:
    """Load the checkpoint with the settings and class names of the command line."""
    predictor = Predictor(
        args.checkpoint,
        device=args.device,
        options=model_options,
        averaged=False if args.no_average else None,
        score_threshold=args.score_threshold,
        top_k=args.top_k,
        batch_size=args.batch_size,
        amp=args.half or args.amp_dtype is not None,
        amp_dtype=args.amp_dtype,
        scale=args.scale,
        max_size=args.max_size,
        compile=args.compile,
    )
    if args.class_names is not None:
        rename_classes(predictor, args.class_names)
    return predictor


def rename_classes(predictor: Predictor, path: Path) -> None:
    """Give the labels the names of a text file, or names and category ids of COCO annotations.

    Raises:
        DatasetError: the annotations cannot be used. OptionError: the text file cannot, or has another count.
    """
    count = len(predictor.class_names)
    if path.suffix == ".json":
        mapping = predictor.detector.args.label_mapping
        labels = LabelMap(read_categories(path), mapping=mapping, num_classes=count)
        predictor.class_names = labels.class_names
        predictor.category_ids = labels.to_categories(torch.arange(count)).tolist()
        return
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read --class_names {path}: {error}") from error
    if len(names) != count:
        raise OptionError(f"expected {count} lines in {path}, one per label of the model, got {len(names)}")
    predictor.class_names = names


def read_image_ids(path: Path, inputs: Sequence[Input]) -> dict[str, int]:
    """Return file name -> image id of a COCO file that lists all inputs.

    Raises:
        DatasetError: it cannot be used, or an input is not in it.
    """
    images = load_annotation_file(path, objects_required=False)["images"]
    image_ids = {Path(image["file_name"]).name: image["id"] for image in images}
    unknown = [source.path for source in inputs if source.path.name not in image_ids]
    if unknown:
        raise DatasetError(f"{path} does not list {unknown[0]} (and {len(unknown) - 1} other inputs)")
    return image_ids


def open_writers(
    args: argparse.Namespace, predictor: Predictor, image_ids: dict[str, int] | None, pool: ThreadPoolExecutor
) -> list[Writer]:
    """Open what `--save` asks for."""
    categories = predictor.category_ids
    if "coco" in args.save and categories is None:
        raise OptionError(
            f"{args.checkpoint} does not say which category ids its labels stand for, and --save coco needs them: pass "
            "--class_names with the COCO annotations it was trained on"
        )
    most_waiting = 2 * args.num_workers
    opening: dict[str, Callable[[], Writer]] = {
        "pictures": partial(PictureWriter, args.output / "pictures", pool, most_waiting=most_waiting),
        "coco": partial(
            CocoWriter,
            args.output,
            categories=categories or (),
            class_names=predictor.class_names,
            image_ids=image_ids,
        ),
        "json_lines": partial(JsonLinesWriter, args.output / "predictions.jsonl"),
        "csv": partial(CsvWriter, args.output / "predictions.csv"),
    }
    return [opening[name]() for name in dict.fromkeys(args.save)]


if __name__ == "__main__":
    sys.exit(main())
