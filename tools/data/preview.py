"""Draw a contact sheet: pictures with their boxes and class names, drawn by chance (--seed) or by id.

Crowd regions are dashed. --only_problems draws pictures for which `check` has something to say about a box or an
entry, with what it says under them.

Examples::

    python -m tools.dataset preview --coco_path data/mine --output preview.jpg
    python -m tools.dataset preview labels.json --images pictures --image_ids 17 23 --output preview.png
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from datasets.annotations import DatasetError
from datasets.images import decode_image
from tools.data.check import check_data_set
from tools.data.kinds import KINDS
from tools.data.layout import SplitPaths, add_source_arguments, chosen_splits, load_content
from tools.data.sheet import Cell, draw_sheet
from util.errors import OptionError

HELP = "draw pictures with their boxes"


def preview(
    paths: SplitPaths,
    *,
    count: int = 12,
    seed: int = 0,
    image_ids: Sequence[int] = (),
    only_problems: bool = False,
    columns: int = 4,
    width: int = 320,
) -> Image.Image:
    """Draw pictures of one split.

    Args:
        paths: the split, with its image folder.
        count: pictures drawn by chance; seed: which.
        image_ids: draw these instead.
        only_problems: draw by chance among pictures with problems.
        columns: pictures side by side; width: pixels of each.

    Raises:
        OptionError: an id is unknown. DatasetError: the data cannot be read, or no picture has a problem.
    """
    content = load_content(paths)
    images = {image["id"]: image for image in content["images"]}
    notes = _problems(paths) if only_problems else {}
    if only_problems and not notes:
        raise DatasetError(f"no picture of {paths.annotation_file} has a problem: leave out --only_problems")
    unknown = [image_id for image_id in image_ids if image_id not in images]
    if unknown:
        raise OptionError(f"--image_ids: {paths.annotation_file} has no image {unknown[0]}")
    candidates = sorted(notes or images)
    chosen = list(image_ids) or sorted(random.Random(seed).sample(candidates, min(count, len(candidates))))
    objects: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in chosen}
    for annotation in content["annotations"]:
        if annotation["image_id"] in objects:
            objects[annotation["image_id"]].append(annotation)
    names = {category["id"]: category["name"] for category in content["categories"]}
    cells = [_cell(paths, images[i], objects[i], names, notes.get(i, "")) for i in chosen]
    return draw_sheet(cells, sorted(names), columns=columns, width=width)


def _problems(paths: SplitPaths) -> dict[int, str]:
    # Pictures that are missing or broken cannot be drawn.
    result = check_data_set([paths], read_images=False)
    notes: dict[int, str] = {}
    for problem in result.problems:
        if problem.image_id is not None:
            notes.setdefault(problem.image_id, KINDS[problem.kind].title)
    return notes


def _cell(
    paths: SplitPaths,
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    note: str,
) -> Cell:
    if paths.image_folder is None:
        raise OptionError("pass --images FOLDER, where the pictures lie")
    path = paths.image_folder / image["file_name"]
    try:
        picture = decode_image(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"cannot read {path} ({error.strerror}): complete the folder") from error
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    what = f"{len(annotations)} object{'' if len(annotations) == 1 else 's'}"
    return Cell(
        picture=picture,
        boxes_xywh=[tuple(annotation["bbox"]) for annotation in annotations],
        categories=[annotation["category_id"] for annotation in annotations],
        texts=[names[a["category_id"]] + (" (crowd)" if a["iscrowd"] else "") for a in annotations],
        is_crowd=[bool(annotation["iscrowd"]) for annotation in annotations],
        caption=f"{image['id']}: {image['file_name']}",
        second_line=note or f"{picture.width} x {picture.height}, {what}",
    )


def join_sheets(sheets: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put sheets below each other, each under its title; a single one stays as it is."""
    if len(sheets) == 1:
        return sheets[0][1]
    title_height = 26
    height = sum(sheet.height + title_height for _, sheet in sheets)
    joined = Image.new("RGB", (max(sheet.width for _, sheet in sheets), height), "white")
    draw, top = ImageDraw.Draw(joined), 0
    for title, sheet in sheets:
        draw.text((6, top + 6), title, fill="black", font_size=16)
        joined.paste(sheet, (0, top + title_height))
        top += sheet.height + title_height
    return joined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `preview`."""
    add_source_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture to write: .png or .jpg")
    parser.add_argument("--count", default=12, type=int, help="pictures per split (12)")
    parser.add_argument("--seed", default=0, type=int, help="another seed, other pictures (0)")
    parser.add_argument("--image_ids", nargs="+", type=int, default=[], metavar="ID", help="draw these instead")
    parser.add_argument("--only_problems", action="store_true", help="draw pictures that check complains about")
    parser.add_argument("--columns", default=4, type=int, help="pictures side by side (4)")
    parser.add_argument("--width", default=320, type=int, help="pixels of each (320)")


def main(args: argparse.Namespace) -> int:
    """Draw the sheet; return the exit status."""
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise OptionError(f"--output {args.output}: the name ends in .png or .jpg")
    if min(args.count, args.columns) < 1 or args.width < 64:
        raise OptionError("--count and --columns are at least 1, --width at least 64")
    splits = chosen_splits(args)
    if args.image_ids and (len(splits) > 1 or args.only_problems):
        raise OptionError("--image_ids belong to a single annotation file with --images, without --only_problems")
    look = {"count": args.count, "seed": args.seed, "columns": args.columns, "width": args.width}
    sheets = [
        (paths.name, preview(paths, image_ids=args.image_ids, only_problems=args.only_problems, **look))
        for paths in splits
    ]
    sheet = join_sheets(sheets)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(args.output, quality=88)
    except OSError as error:
        raise OptionError(f"cannot write {args.output} ({error.strerror}): choose another place") from error
    print(f"wrote {args.output} ({sheet.width} x {sheet.height})")
    return 0
