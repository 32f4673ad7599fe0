"""Turn YOLO, Pascal VOC or CSV annotations into the COCO layout that --coco_path reads.

Pictures are copied, or linked with --link. A row that cannot be used is named with file and line and stops the
conversion before anything is written; --skip_bad goes on without it. Category ids count from 1 (--first_id).

YOLO: SOURCE is data.yaml or a folder with classes.txt; rows are boxes or polygons. VOC: SOURCE holds Annotations,
JPEGImages and ImageSets/Main; pixels count from 1 and xmax is the last pixel of the object (--origin 0: edges).
CSV: SOURCE is a table or a folder with train.csv and val.csv; corners are edges (--origin 1: as VOC).
Without a list of splits everything becomes train: divide it with the subcommand split.

Examples::

    python -m tools.dataset convert --from yolo downloads/data.yaml --output data/mine --link
    python -m tools.dataset convert --from voc VOC2007 --output data/voc --sets train=trainval val=test
    python -m tools.dataset convert --from csv boxes.csv --images pictures --output data/mine \\
        --columns filename xmin ymin xmax ymax class
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.annotations import DatasetError
from tools.data.convert_csv import COLUMNS, read_csv
from tools.data.convert_voc import read_voc
from tools.data.convert_yolo import read_yolo
from tools.data.layout import place_picture, refuse_existing, split_paths, write_json
from tools.data.sources import Source, SourceImage, read_lines
from util.errors import OptionError

HELP = "turn YOLO, VOC or CSV into COCO's layout"
_BAD_ROWS_SHOWN = 20


def write_coco(
    source: Source, output: Path, *, link: bool = False, first_id: int = 1, difficult_as_crowd: bool = False
) -> dict[str, Path]:
    """Write a data set in COCO's layout.

    Args:
        source: what was read.
        output: folder that gets `annotations/instances_*2017.json` and `*2017/` with the pictures.
        link: make symbolic links to the pictures instead of copying them.
        first_id: category id of the first class.
        difficult_as_crowd: objects marked difficult become crowd regions: never trained on or counted.

    Returns:
        Split -> its annotation file. Ids of images and annotations are unique over all splits.

    Raises:
        OptionError, DatasetError: something is there already, or cannot be written.
    """
    places = {name: split_paths(output, name) for name, images in source.splits.items() if images}
    refuse_existing([paths.annotation_file for paths in places.values()])
    categories = [{"id": label + first_id, "name": name} for label, name in enumerate(source.class_names)]
    image_id = annotation_id = 0
    for name, paths in places.items():
        images, annotations = [], []
        for image in source.splits[name]:
            image_id += 1
            assert paths.image_folder is not None
            place_picture(image.path, paths.image_folder / image.name, link=link)
            images.append({"id": image_id, "file_name": image.name, "width": image.width, "height": image.height})
            for annotation in _annotations(image, first_id, difficult_as_crowd):
                annotation_id += 1
                annotations.append({"id": annotation_id, "image_id": image_id, **annotation})
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(content, paths.annotation_file)
    return {name: paths.annotation_file for name, paths in places.items()}


def _annotations(image: SourceImage, first_id: int, difficult_as_crowd: bool) -> list[dict[str, Any]]:
    annotations = []
    for thing in image.objects:
        annotation: dict[str, Any] = {
            "category_id": thing.label + first_id,
            "bbox": [round(value, 4) for value in thing.box_xywh],
            "area": round(thing.area, 4),
            "iscrowd": int(thing.is_difficult and difficult_as_crowd),
        }
        if thing.polygon:
            annotation["segmentation"] = [[round(value, 4) for value in thing.polygon]]
        if thing.is_difficult:
            # Kept, so that --remove_difficult of main.py can leave it out.
            annotation["difficult"] = 1
        annotations.append(annotation)
    return annotations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder of the other format")
    parser.add_argument("--from", dest="format", required=True, choices=("yolo", "voc", "csv"), help="its format")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--link", action="store_true", help="symbolic links to the pictures instead of copies")
    parser.add_argument("--skip_bad", action="store_true", help="leave out what cannot be converted")
    parser.add_argument("--first_id", default=1, type=int, metavar="ID", help="category id of the first class (1)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="voc, csv: folder of the pictures")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="voc, csv: class names, one a line, in order")
    parser.add_argument("--origin", type=int, choices=(0, 1), help="voc (1), csv (0): how pixels are counted")
    parser.add_argument("--sets", nargs="+", default=[], metavar="SPLIT=LIST", help="voc: lists in ImageSets/Main")
    parser.add_argument("--difficult_as_crowd", action="store_true", help="voc: difficult objects become crowd")
    parser.add_argument("--columns", nargs=6, metavar="NAME", help=f"csv: headers of {', '.join(COLUMNS)}")
    parser.add_argument("--no_header", action="store_true", help="csv: no header; columns stand in that order")
    parser.add_argument("--delimiter", metavar="CHARACTER", help="csv: between columns (,)")


# Option -> formats that know it.
_BELONGS_TO: Mapping[str, Sequence[str]] = {
    "images": ("voc", "csv"),
    "classes": ("voc", "csv"),
    "origin": ("voc", "csv"),
    "sets": ("voc",),
    "difficult_as_crowd": ("voc",),
    "columns": ("csv",),
    "no_header": ("csv",),
    "delimiter": ("csv",),
}


def read_source(args: argparse.Namespace) -> Source:
    """Read what the options of `add_arguments` name.

    Raises:
        OptionError: it cannot be found, or an option means nothing for the format.
    """
    for option, formats in _BELONGS_TO.items():
        if args.format not in formats and getattr(args, option) not in (None, False, []):
            raise OptionError(f"--{option} means nothing to --from {args.format}: leave it out")
    if args.no_header and args.columns:
        raise OptionError("--columns names columns of a header: leave it out with --no_header")
    for path in (args.source, args.images, args.classes):
        if path is not None and not path.exists():
            raise OptionError(f"no file or folder {path}: check the path")
    if args.format == "yolo":
        return read_yolo(args.source)
    class_names = [line for _, line in read_lines(args.classes)] if args.classes else []
    if args.format == "voc":
        if not all("=" in entry for entry in args.sets):
            raise OptionError(f"--sets expects SPLIT=LIST such as train=trainval, got {' '.join(args.sets)}")
        sets = dict(entry.split("=", 1) for entry in args.sets)
        origin = 1 if args.origin is None else args.origin
        return read_voc(args.source, images=args.images, sets=sets, class_names=class_names, origin=origin)
    return read_csv(
        args.source,
        images=args.images,
        columns=args.columns or COLUMNS,
        has_header=not args.no_header,
        delimiter=args.delimiter or ",",
        class_names=class_names,
        origin=args.origin or 0,
    )


def _rows(source: Source) -> str:
    return "1 bad row" if len(source.bad) == 1 else f"{len(source.bad)} bad rows"


def main(args: argparse.Namespace) -> int:
    """Convert, and say what was written; return the exit status."""
    source = read_source(args)
    if source.bad:
        for row in source.bad[:_BAD_ROWS_SHOWN]:
            sys.stderr.write(f"{row}\n")
        if len(source.bad) > _BAD_ROWS_SHOWN:
            sys.stderr.write(f"and {len(source.bad) - _BAD_ROWS_SHOWN} more\n")
        if not args.skip_bad:
            raise DatasetError(f"{_rows(source)} cannot be converted: correct them, or pass --skip_bad")
        print(f"left out {_rows(source)}")
    files = write_coco(
        source, args.output, link=args.link, first_id=args.first_id, difficult_as_crowd=args.difficult_as_crowd
    )
    if not files:
        raise DatasetError(f"{args.source} holds no picture that can be used: nothing was written")
    for name, file in files.items():
        images = source.splits[name]
        print(f"{file}: {len(images)} images, {sum(len(i.objects) for i in images)} objects")
    print(f"{len(source.class_names)} classes: {', '.join(source.class_names)}")
    if "val" not in files:
        print(f"no val split: python -m tools.dataset split {files['train']} --fractions 0.8 0.2 --output DIR")
    return 0
