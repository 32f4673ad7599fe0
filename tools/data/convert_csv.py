"""Tables: one row per object with file, xmin, ymin, xmax, ymax and label; a row with a file alone has no object.

The source is one CSV file, or a folder with train.csv and val.csv. Corners are edges in pixels, the box is xmax - xmin
wide; `--origin 1` reads corners counted from 1, with xmax the last pixel of the object, as Pascal VOC does.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from tools.data.sources import BadRow, Source, SourceImage, SourceObject, corner_box
from util.errors import OptionError

COLUMNS = ("file", "xmin", "ymin", "xmax", "ymax", "label")
_SPLITS = ("train", "val", "test")
Row = tuple[int, list[str]]


def read_csv(
    source: Path,
    *,
    images: Path | None,
    columns: Sequence[str],
    has_header: bool,
    delimiter: str,
    class_names: Sequence[str],
    origin: int,
) -> Source:
    """Read a data set in tables.

    Args:
        source: a CSV file, or the folder of train.csv and val.csv.
        images: folder that the file column starts from; None = that of the table.
        columns: header names of file, xmin, ymin, xmax, ymax and label.
        has_header: the first row names the columns; without, they stand in that order.
        delimiter: between columns.
        class_names: the classes; empty takes those found, in alphabetical order.
        origin: 0 or 1, see the module.

    Raises:
        OptionError: tables or columns cannot be found.
    """
    tables = {"train": source} if source.is_file() else {s: source / f"{s}.csv" for s in _SPLITS}
    tables = {split: path for split, path in tables.items() if path.is_file()}
    if not tables:
        raise OptionError(f"no table {source / 'train.csv'}: pass a CSV file, or a folder with train.csv and val.csv")
    rows = {split: _read_rows(path, columns, has_header, delimiter) for split, path in tables.items()}
    found = {cells[5] for table in rows.values() for _, cells in table if len(cells) == len(COLUMNS) and cells[5]}
    result = Source(list(class_names) or sorted(found))
    for split, path in tables.items():
        result.splits[split] = _read_table(path, rows[split], images or path.parent, result, origin)
    return result


def _read_rows(path: Path, columns: Sequence[str], has_header: bool, delimiter: str) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"{path} is no CSV text ({error}): save it as UTF-8") from error
    if not has_header:
        return rows
    header = rows[0][1] if rows else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise OptionError(
            f"{path}: no column {', '.join(missing)} among {', '.join(header)}: name the columns of file, xmin, ymin, "
            "xmax, ymax and label with --columns, in this order, or pass --no_header"
        )
    places = [header.index(name) for name in columns]
    # A row of another length stays as it is and is refused where its file and line are named.
    return [(n, [cells[i] for i in places] if len(cells) == len(header) else cells[:1]) for n, cells in rows[1:]]


def _read_table(path: Path, rows: Sequence[Row], folder: Path, result: Source, origin: int) -> list[SourceImage]:
    first_line = {cells[0]: number for number, cells in reversed(rows)}
    files = [(folder / name, name) for name in sorted(first_line)]
    asked = [BadRow(path, first_line[name], "") for _, name in files]
    images = {image.name: image for image in result.add_pictures(files, asked) if image is not None}
    label_of = {name: label for label, name in enumerate(result.class_names)}
    for number, cells in rows:
        if cells[0] not in images:
            continue
        if len(cells) != len(COLUMNS):
            result.bad.append(BadRow(path, number, f"expected {len(COLUMNS)} columns that the header names"))
        elif any(cells[1:]):
            box = corner_box(cells[1:5], origin=origin, size=images[cells[0]])
            if cells[5] not in label_of:
                result.bad.append(BadRow(path, number, f"class '{cells[5]}' is none of {', '.join(label_of)}"))
            elif isinstance(box, str):
                result.bad.append(BadRow(path, number, box))
            else:
                left, top, width, height = box
                images[cells[0]].objects.append(SourceObject(label_of[cells[5]], (left, top, width, height)))
    return list(images.values())
