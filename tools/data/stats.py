"""Count a data set: objects per picture against the queries, box sizes before and after the resize, classes.

Examples::

    python -m tools.dataset stats --coco_path data/mine --num_queries 300 --plot stats.png
    python -m tools.dataset stats labels.json --json stats.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.annotations import DatasetError, clip_boxes, has_area, read_objects
from datasets.transforms import resized_hw
from tools.data.layout import SplitPaths, add_source_arguments, chosen_splits, load_content, write_json
from tools.data.pictures import read_pictures
from tools.data.stats_plot import plot_stats
from util.errors import OptionError
from util.logger import format_table

HELP = "count objects, sizes and classes, with a plot"
# COCO's borders between small, medium and large, in square pixels.
SMALL, LARGE = 32**2, 96**2
_BYTES_PER_WEIGHT = 4


@dataclass
class Counts:
    """Columns of one split, from which all numbers are made. Crowd regions and boxes without area are left out.

    Attributes:
        name: of the split.
        objects_per_image: (N,).
        picture_wh: (N, 2) pixels; resized_wh: after the evaluation's resize.
        box_wh: (T, 2) pixels inside the picture; area: (T,) as annotated; category: (T,); image: (T,) position.
        scale: (T,) product of both sides' factors of the resize.
        num_crowd, num_dropped: crowd regions and boxes without area in the picture.
        class_names: id -> name.
    """

    name: str
    objects_per_image: NDArray[np.int64]
    picture_wh: NDArray[np.float64]
    resized_wh: NDArray[np.float64]
    box_wh: NDArray[np.float64]
    area: NDArray[np.float64]
    category: NDArray[np.int64]
    image: NDArray[np.int64]
    scale: NDArray[np.float64]
    num_crowd: int
    num_dropped: int
    class_names: dict[int, str]


def count_split(paths: SplitPaths, *, scale: int = 800, max_size: int = 1333) -> Counts:
    """Read one split.

    Args:
        paths: where it lies; pictures are opened only where the annotation file leaves out a size.
        scale, max_size: short and longest side of the resize.

    Raises:
        DatasetError: the annotations cannot be read, or a size is unknown.
    """
    content = load_content(paths)
    images = sorted(content["images"], key=lambda image: image["id"])
    picture_wh = _picture_sizes(images, paths)
    resized = [resized_hw(int(w), int(h), scale, max_size)[::-1] for w, h in picture_wh]
    resized_wh = np.array(resized, dtype=np.float64).reshape(-1, 2)
    position = {image["id"]: place for place, image in enumerate(images)}
    image = np.array([position[a["image_id"]] for a in content["annotations"]], dtype=np.int64)
    objects = read_objects(content["annotations"])
    boxes_xyxy = clip_boxes(objects.boxes_xywh, picture_wh[image, 0], picture_wh[image, 1])
    is_crowd = objects.iscrowd != 0
    kept = has_area(boxes_xyxy) & ~is_crowd
    factors = (resized_wh / picture_wh).prod(1)
    return Counts(
        name=paths.name,
        objects_per_image=np.bincount(image[kept], minlength=len(images)),
        picture_wh=picture_wh,
        resized_wh=resized_wh,
        box_wh=(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2])[kept].astype(np.float64),
        area=objects.area[kept].astype(np.float64),
        category=objects.categories[kept],
        image=image[kept],
        scale=factors[image[kept]],
        num_crowd=int(is_crowd.sum()),
        num_dropped=int((~kept & ~is_crowd).sum()),
        class_names={entry["id"]: entry["name"] for entry in sorted(content["categories"], key=lambda c: c["id"])},
    )


def _picture_sizes(images: Sequence[Mapping[str, Any]], paths: SplitPaths) -> NDArray[np.float64]:
    if not images:
        raise DatasetError(f"{paths.annotation_file} lists no image")
    sizes = {place: (image.get("width"), image.get("height")) for place, image in enumerate(images)}
    unknown = [place for place, size in sizes.items() if not all(isinstance(side, int) and side > 0 for side in size)]
    if unknown and paths.image_folder is None:
        raise DatasetError(f"image {images[unknown[0]]['id']} has no width and height: pass --images FOLDER")
    if unknown:
        folder = Path(paths.image_folder or "")
        pictures = read_pictures([folder / images[place]["file_name"] for place in unknown], hashed=False)
        for place, picture in zip(unknown, pictures, strict=True):
            if picture.fault:
                raise DatasetError(f"{folder / images[place]['file_name']}: {picture.fault}")
            sizes[place] = (picture.width, picture.height)
    return np.array([sizes[place] for place in range(len(images))], dtype=np.float64)


def summarise(counts: Counts, *, num_queries: int, groups: int, heads: int = 8) -> dict[str, Any]:
    """Compute the numbers of one split.

    Args:
        counts: of the split.
        num_queries: of the detector.
        groups: denoising groups (`--scalar`).
        heads: attention heads.

    Returns:
        Nested tables, ready for JSON.
    """
    per_image = counts.objects_per_image
    most = int(per_image.max(initial=0))
    queries = num_queries + groups * most
    names = counts.class_names
    in_classes = {
        names[c]: {
            "id": c,
            "objects": int((counts.category == c).sum()),
            "images": len(np.unique(counts.image[counts.category == c])),
        }
        for c in names
    }
    sides = counts.box_wh
    return {
        "images": len(per_image),
        "images_without_objects": int((per_image == 0).sum()),
        "objects": len(counts.category),
        "crowd_regions": counts.num_crowd,
        "boxes_dropped": counts.num_dropped,
        "objects_per_image": _quantiles(per_image),
        "images_with_more_objects_than_queries": int((per_image > num_queries).sum()),
        "denoising": {
            "groups": groups,
            "most_objects": most,
            "denoising_queries": groups * most,
            "all_queries": queries,
            "attention_bytes_per_image_and_layer": heads * queries**2 * _BYTES_PER_WEIGHT,
            "attention_bytes_without_denoising": heads * num_queries**2 * _BYTES_PER_WEIGHT,
        },
        "sizes_as_annotated": _sizes(counts.area),
        "sizes_after_resize": _sizes(counts.area * counts.scale),
        "box_side": _quantiles(np.sqrt(sides.prod(1))),
        "aspect_ratio": _quantiles(sides[:, 0] / sides[:, 1]),
        "picture_width": _quantiles(counts.picture_wh[:, 0]),
        "picture_height": _quantiles(counts.picture_wh[:, 1]),
        "classes": in_classes,
    }


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {}
    points = dict(zip(("min", "median", "p95", "max"), np.quantile(values, (0, 0.5, 0.95, 1)).tolist(), strict=True))
    return {"mean": float(values.mean()), **points}


def _sizes(area: NDArray[np.float64]) -> dict[str, int]:
    small, large = int((area < SMALL).sum()), int((area > LARGE).sum())
    return {"small": small, "medium": len(area) - small - large, "large": large}


def format_stats(tables: Mapping[str, Mapping[str, Any]], *, scale: int, max_size: int, num_queries: int) -> str:
    """Lay out the numbers of all splits side by side."""

    def row(title: str, *keys: str) -> tuple[str, ...]:
        return (title, *(_cell(table, keys) for table in tables.values()))

    rows = [row(key.replace("_", " "), key) for key in ("images", "images_without_objects", "objects")]
    rows += [row("crowd regions", "crowd_regions"), row("boxes outside or without area", "boxes_dropped")]
    rows += [row(f"objects per image, {p}", "objects_per_image", p) for p in ("mean", "median", "p95", "max")]
    rows.append(row(f"images with more than {num_queries} objects", "images_with_more_objects_than_queries"))
    for title, key in (("as annotated", "sizes_as_annotated"), (f"at {scale}/{max_size}", "sizes_after_resize")):
        rows += [row(f"{size}, {title}", key, size) for size in ("small", "medium", "large")]
    for title, key in (
        ("box side (root of w x h)", "box_side"), ("width / height of boxes", "aspect_ratio"),
        ("picture width", "picture_width"), ("picture height", "picture_height"),
    ):  # fmt: skip
        rows += [row(f"{title}, {point}", key, point) for point in ("min", "median", "max")]
    first = next(iter(tables.values()))
    parts = [format_table(("", *tables), rows), _format_classes(tables)]
    parts.append(_denoising_hint(first["denoising"], num_queries, next(iter(tables))))
    return "\n\n".join(parts)


def _cell(table: Mapping[str, Any], keys: Sequence[str]) -> str:
    value: Any = table
    for key in keys:
        value = value.get(key)
        if value is None:
            return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_classes(tables: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for table in tables.values() for name in table["classes"]))
    first = next(iter(tables.values()))["classes"]
    names.sort(key=lambda name: -first.get(name, {}).get("objects", 0))
    header = ["class", *(f"{split} {what}" for split in tables for what in ("objects", "images"))]
    rows = []
    for name in names:
        cells = [table["classes"].get(name, {}) for table in tables.values()]
        rows.append([name, *(str(cell.get(what, "-")) for cell in cells for what in ("objects", "images"))])
    return format_table(header, rows)


def _denoising_hint(numbers: Mapping[str, int], num_queries: int, split: str) -> str:
    mib = {key: numbers[key] / 2**20 for key in numbers}
    return (
        f"denoising: {numbers['groups']} groups x {numbers['most_objects']} objects = {numbers['denoising_queries']} "
        f"queries beside {num_queries} in the fullest picture of {split}; the decoder's self-attention then takes "
        f"{mib['attention_bytes_per_image_and_layer']:.1f} MiB of weights per picture of the batch and layer (8 heads, "
        f"float32), without denoising {mib['attention_bytes_without_denoising']:.1f} MiB. --dn_number N bounds it."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stats`."""
    add_source_arguments(parser)
    parser.add_argument("--num_queries", default=300, type=int, help="queries of the detector (300)")
    parser.add_argument("--scalar", default=5, type=int, help="denoising groups (5)")
    parser.add_argument("--eval_scale", default=800, type=int, help="short side after the resize (800)")
    parser.add_argument("--data_aug_max_size", default=1333, type=int, help="longest side after the resize (1333)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a plot: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a JSON file")


def main(args: argparse.Namespace) -> int:
    """Print the numbers, draw the plot; return the exit status."""
    if min(args.num_queries, args.scalar, args.eval_scale) < 1 or args.data_aug_max_size < args.eval_scale:
        raise OptionError("--num_queries, --scalar and --eval_scale are at least 1, --data_aug_max_size no less")
    if args.plot is not None and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"--plot {args.plot}: the name ends in .png, .svg or .pdf")
    size = {"scale": args.eval_scale, "max_size": args.data_aug_max_size}
    counts = [count_split(paths, **size) for paths in chosen_splits(args)]
    tables = {c.name: summarise(c, num_queries=args.num_queries, groups=args.scalar) for c in counts}
    print(format_stats(tables, **size, num_queries=args.num_queries))
    if args.json is not None:
        write_json(tables, args.json)
        print(f"wrote {args.json}")
    if args.plot is not None:
        plot_stats(counts, args.plot, num_queries=args.num_queries, scale=args.eval_scale)
        print(f"wrote {args.plot}")
    return 0
