"""`python -m tools.dataset convert`: YOLO, VOC and CSV become COCO's layout and come back the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools import dataset
from tools.data.check import check_data_set
from tools.data.layout import split_paths

NAMES = ("cat", "dog")
# picture -> size and objects as (class, left, top, width, height) in pixels.
Objects = list[tuple[int, float, float, float, float]]
PICTURES: dict[str, dict[str, tuple[tuple[int, int], Objects]]] = {
    "train": {
        "a": ((40, 30), [(0, 4, 5, 10, 12), (1, 0, 0, 40, 30)]),
        "b": ((64, 48), []),
        "c": ((31, 57), [(1, 3, 7, 11, 50)]),
    },
    "val": {"d": ((50, 50), [(0, 10, 20, 5, 6)])},
}


def write_pictures(root: Path, folder: str) -> None:
    """Write the pictures, `folder` naming where those of a split lie."""
    for split, pictures in PICTURES.items():
        place = root / folder.format(split=split)
        place.mkdir(parents=True, exist_ok=True)
        for number, (name, (size, _)) in enumerate(pictures.items()):
            Image.new("RGB", size, (40 * number, 90, len(split))).save(place / f"{name}.png")


def write_yolo(root: Path) -> Path:
    """Write the data set as YOLO does; picture b has no label file. Returns data.yaml."""
    write_pictures(root, "images/{split}")
    for split, pictures in PICTURES.items():
        (root / "labels" / split).mkdir(parents=True)
        for name, ((width, height), objects) in pictures.items():
            rows = [
                f"{label} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}"
                for label, x, y, w, h in objects
            ]
            if rows:
                (root / "labels" / split / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n")
    return root / "data.yaml"


def write_voc(root: Path, origin: int = 1, difficult: str = "") -> Path:
    """Write the data set as Pascal VOC does, names in `difficult` marked so; returns its folder."""
    write_pictures(root, "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, pictures in PICTURES.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in pictures))
        for name, ((width, height), objects) in pictures.items():
            entries = "".join(
                f"<object>\n<name>{NAMES[label]}</name><difficult>{int(NAMES[label] == difficult)}</difficult>\n"
                f"<bndbox><xmin>{x + origin:g}</xmin><ymin>{y + origin:g}</ymin>"
                f"<xmax>{x + w:g}</xmax><ymax>{y + h:g}</ymax></bndbox></object>\n"
                for label, x, y, w, h in objects
            )
            size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}.png</filename>\n{size}\n{entries}</annotation>"
            (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


def write_csv(root: Path, header: tuple[str, ...] = ("file", "xmin", "ymin", "xmax", "ymax", "label")) -> Path:
    """Write the data set as tables; returns its folder."""
    write_pictures(root, "{split}")
    for split, pictures in PICTURES.items():
        with (root / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            if header:
                writer.writerow(header)
            for name, (_, objects) in pictures.items():
                for label, x, y, w, h in objects:
                    writer.writerow([f"{split}/{name}.png", x, y, x + w, y + h, NAMES[label]])
                if not objects:
                    writer.writerow([f"{split}/{name}.png", "", "", "", "", ""])
    return root


def convert(source: Path, output: Path, kind: str, *more: Any, status: int = 0) -> None:
    argv = ["convert", "--from", kind, str(source), "--output", str(output), *map(str, more)]
    assert dataset.main(argv) == status


def read_back(output: Path, first_id: int = 1) -> dict[str, dict[str, tuple[tuple[int, int], list[Any]]]]:
    """Return what was written in the form of `PICTURES`, boxes as lists."""
    found: dict[str, dict[str, Any]] = {}
    for split in ("train", "val"):
        content = json.loads(split_paths(output, split).annotation_file.read_text())
        assert content["categories"] == [{"id": first_id + n, "name": name} for n, name in enumerate(NAMES)]
        names = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        found[split] = {names[i["id"]]: ((i["width"], i["height"]), []) for i in content["images"]}
        for entry in content["annotations"]:
            assert entry["area"] == pytest.approx(entry["bbox"][2] * entry["bbox"][3], rel=1e-3)
            found[split][names[entry["image_id"]]][1].append((entry["category_id"] - first_id, *entry["bbox"]))
    return found


def assert_same(output: Path, tolerance: float = 1e-9, first_id: int = 1) -> None:
    """Compare what was written with `PICTURES`, and check it."""
    found = read_back(output, first_id)
    assert {split: list(pictures) for split, pictures in found.items()} == {s: list(p) for s, p in PICTURES.items()}
    for split, pictures in PICTURES.items():
        for name, (size, objects) in pictures.items():
            assert found[split][name][0] == size
            assert len(found[split][name][1]) == len(objects)
            for got, expected in zip(found[split][name][1], objects, strict=True):
                assert got == pytest.approx(expected, abs=tolerance)
    problems = check_data_set([split_paths(output, split) for split in PICTURES]).problems
    # Picture b is meant to be empty.
    assert {problem.kind for problem in problems} <= {"image_without_objects", "category_id_zero", "unused_category"}


def test_yolo_round_trip(tmp_path: Path) -> None:
    convert(write_yolo(tmp_path / "in"), tmp_path / "out", "yolo")
    # Six digits of a fraction of 64 pixels.
    assert_same(tmp_path / "out", tolerance=1e-4)


def test_yolo_folder_with_class_list(tmp_path: Path) -> None:
    write_yolo(tmp_path / "in").unlink()
    (tmp_path / "in" / "classes.txt").write_text("cat\ndog\n")
    convert(tmp_path / "in", tmp_path / "out", "yolo", "--first_id", 0)
    assert_same(tmp_path / "out", tolerance=1e-4, first_id=0)


@pytest.mark.parametrize(
    "text",
    [
        "train: ../images/train\nval: ../images/val\nnames: [cat, dog]\n",
        "path: /machine/of/another\ntrain: images/train\nval: [images/val]\nnames: [cat, dog]\n",
        "train: train.txt\nval: images/val\nnames: [cat, dog]\n",
    ],
)
def test_yolo_ways_to_say_where_pictures_lie(tmp_path: Path, text: str) -> None:
    file = write_yolo(tmp_path / "in")
    file.write_text(text)
    (tmp_path / "in" / "train.txt").write_text("".join(f"./images/train/{name}.png\n" for name in "abc"))
    convert(tmp_path / "in", tmp_path / "out", "yolo")
    for split, pictures in PICTURES.items():
        content = json.loads(split_paths(tmp_path / "out", split).annotation_file.read_text())
        assert len(content["images"]) == len(pictures)
        assert len(content["annotations"]) == sum(len(objects) for _, objects in pictures.values())


def test_yolo_polygon_becomes_box_and_segmentation(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "in")
    (tmp_path / "in" / "labels" / "train" / "a.txt").write_text("1 0.25 0.2 0.75 0.2 0.5 0.8\n")
    convert(file, tmp_path / "out", "yolo")
    content = json.loads(split_paths(tmp_path / "out", "train").annotation_file.read_text())
    entry = content["annotations"][0]
    # In a picture of 40 x 30: a triangle of base 20 and height 18.
    assert entry["bbox"] == pytest.approx([10, 6, 20, 18]) and entry["area"] == pytest.approx(180)
    assert entry["segmentation"] == [pytest.approx([10, 6, 30, 6, 20, 24])]


@pytest.mark.parametrize("origin", [0, 1])
def test_voc_round_trip(tmp_path: Path, origin: int) -> None:
    convert(write_voc(tmp_path / "in", origin), tmp_path / "out", "voc", "--origin", origin)
    assert_same(tmp_path / "out")


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    # A whole picture of 40 x 30 is 1, 1, 40, 30.
    convert(write_voc(tmp_path / "in"), tmp_path / "out", "voc")
    assert (1, 0, 0, 40, 30) in read_back(tmp_path / "out")["train"]["a"][1]


def test_voc_named_sets(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "in")
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "mine.txt")
    (lists / "val.txt").rename(lists / "other.txt")
    convert(root, tmp_path / "out", "voc", status=2)
    convert(root, tmp_path / "out", "voc", "--sets", "train=mine", "val=other")
    assert_same(tmp_path / "out")


def test_voc_xml_beside_pictures_is_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "in")
    for path in [*(root / "Annotations").iterdir(), *(root / "JPEGImages").iterdir()]:
        path.rename(root / path.name)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main", "ImageSets"):
        for path in (root / folder).iterdir():
            path.unlink()
        (root / folder).rmdir()
    convert(root, tmp_path / "out", "voc", "--link")
    content = json.loads(split_paths(tmp_path / "out", "train").annotation_file.read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png", "c.png", "d.png"]
    assert (tmp_path / "out" / "train2017" / "a.png").is_symlink()
    assert "no val split: python -m tools.dataset split" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "crowd"), [((), 0), (("--difficult_as_crowd",), 1)])
def test_voc_difficult(tmp_path: Path, option: tuple[str, ...], crowd: int) -> None:
    convert(write_voc(tmp_path / "in", difficult="dog"), tmp_path / "out", "voc", *option)
    content = json.loads(split_paths(tmp_path / "out", "train").annotation_file.read_text())
    marks = [(entry["category_id"], entry["iscrowd"], entry.get("difficult")) for entry in content["annotations"]]
    assert marks == [(1, 0, None), (2, crowd, 1), (2, crowd, 1)]


def test_csv_round_trip(tmp_path: Path) -> None:
    convert(write_csv(tmp_path / "in"), tmp_path / "out", "csv")
    assert_same(tmp_path / "out")


def test_csv_own_columns_and_folder(tmp_path: Path) -> None:
    header = ("filename", "x1", "y1", "x2", "y2", "class")
    root = write_csv(tmp_path / "in", header)
    (tmp_path / "tables").mkdir()
    for split in PICTURES:
        (root / f"{split}.csv").rename(tmp_path / "tables" / f"{split}.csv")
    convert(tmp_path / "tables", tmp_path / "out", "csv", status=2)
    convert(tmp_path / "tables", tmp_path / "out", "csv", "--images", root, "--columns", *header)
    assert_same(tmp_path / "out")


def test_csv_without_header(tmp_path: Path) -> None:
    convert(write_csv(tmp_path / "in", ()), tmp_path / "out", "csv", "--no_header")
    assert_same(tmp_path / "out")


def test_class_list_decides_ids_and_knows_all_classes(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("dog\nbird\ncat\n")
    convert(write_csv(tmp_path / "in"), tmp_path / "out", "csv", "--classes", tmp_path / "names")
    content = json.loads(split_paths(tmp_path / "out", "train").annotation_file.read_text())
    assert [category["name"] for category in content["categories"]] == ["dog", "bird", "cat"]
    assert [entry["category_id"] for entry in content["annotations"]] == [3, 1, 1]


def edited(write_source: Callable[[Path], Path], path: str, edit: Callable[[str], str]) -> Callable[[Path], Path]:
    """Return a function that writes the data set with one file changed."""

    def write(root: Path) -> Path:
        source = write_source(root)
        content = (root / path).read_bytes().decode("latin-1")
        (root / path).write_bytes(edit(content).encode("latin-1"))
        return source

    return write


def yolo_row(row: str) -> Callable[[Path], Path]:
    return edited(write_yolo, "labels/train/c.txt", lambda text: f"{text}\n{row}\n")


def voc_text(old: str, new: str) -> Callable[[Path], Path]:
    return edited(write_voc, "Annotations/c.xml", lambda text: text.replace(old, new))


def csv_row(row: str) -> Callable[[Path], Path]:
    return edited(write_csv, "train.csv", lambda text: f"{text}{row}\n")


def broken_picture(write_source: Callable[[Path], Path], path: str) -> Callable[[Path], Path]:
    return edited(write_source, path, lambda text: "no picture")


BAD = [
    ("yolo", yolo_row("0 0.5 0.5 0.1"), "c.txt:3", "found 4 numbers"),
    ("yolo", yolo_row("0 0.5 0.5 0.1 x"), "c.txt:3", "expected numbers"),
    ("yolo", yolo_row("2 0.5 0.5 0.1 0.1"), "c.txt:3", "class 2 is none of 0 to 1"),
    ("yolo", yolo_row("-1 0.5 0.5 0.1 0.1"), "c.txt:3", "class -1"),
    ("yolo", yolo_row("0.5 0.5 0.5 0.1 0.1"), "c.txt:3", "class 0.5"),
    ("yolo", yolo_row("nan 0.5 0.5 0.1 0.1"), "c.txt:3", "class nan"),
    ("yolo", yolo_row("0 0.5 0.5 0 0.1"), "c.txt:3", "has no area"),
    ("yolo", yolo_row("0 0.5 0.5 nan 0.1"), "c.txt:3", "between 0 and 1"),
    ("yolo", yolo_row("0 12 15 4 6"), "c.txt:3", "between 0 and 1"),
    ("yolo", broken_picture(write_yolo, "images/train/c.png"), "c.png", "not a readable picture"),
    ("voc", voc_text("<xmin>4", "<xmin>x"), "c.xml:3", "expected the numbers"),
    ("voc", voc_text("<xmin>4", "<xmin>nan"), "c.xml:3", "finite"),
    ("voc", voc_text("<xmin>4", "<xmin>400"), "c.xml:3", "has no area"),
    ("voc", voc_text("<xmin>4</xmin>", ""), "c.xml:3", "expected the numbers"),
    ("voc", voc_text("<width>31", "<width>57"), "c.xml:2", "says 57 x 57, the picture has 31 x 57"),
    ("voc", voc_text("</annotation>", ""), "c.xml", "is no XML"),
    ("voc", broken_picture(write_voc, "JPEGImages/c.png"), "c.xml", "not a readable picture"),
    ("csv", csv_row("train/c.png,1,2,3"), "train.csv:6", "expected 6 columns"),
    ("csv", csv_row("train/c.png,1,2,x,4,dog"), "train.csv:6", "expected the numbers"),
    ("csv", csv_row("train/c.png,1,2,1,4,dog"), "train.csv:6", "has no area"),
    ("csv", csv_row("train/c.png,41,2,50,4,dog"), "train.csv:6", "outside the picture of 31 x 57"),
    ("csv", csv_row("train/c.png,1,2,3,4,"), "train.csv:6", "class ''"),
    ("csv", csv_row("train/z.png,1,2,3,4,dog"), "train.csv:6", "no such file"),
]


@pytest.mark.parametrize(("kind", "write", "place", "words"), BAD)
def test_bad_row_is_named_and_stops_or_is_skipped(
    tmp_path: Path,
    kind: str,
    write: Callable[[Path], Path],
    place: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "in")
    convert(source, tmp_path / "out", kind, status=1)
    lines = capsys.readouterr().err.splitlines()
    assert f"{place}:" in lines[0] and words in lines[0]
    assert "1 bad row cannot be converted" in lines[-1] and not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", kind, "--skip_bad")
    assert "left out 1 bad row" in capsys.readouterr().out
    content = json.loads(split_paths(tmp_path / "out", "train").annotation_file.read_text())
    assert len(content["annotations"]) in (2, 3) and len(content["images"]) in (2, 3)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("yolo", ("--origin", 1), "--origin means nothing to --from yolo"),
        ("csv", ("--sets", "train=x"), "--sets means nothing to --from csv"),
        ("csv", ("--no_header", "--columns", *"abcdef"), "leave it out with --no_header"),
        ("voc", ("--sets", "train"), "SPLIT=LIST"),
        ("voc", (), "no XML file"),
        ("yolo", (), "no data.yaml and no classes.txt"),
        ("csv", (), "no table"),
    ],
)
def test_wrong_usage_is_one_sentence(
    tmp_path: Path, kind: str, more: tuple[Any, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tmp_path, tmp_path / "out", kind, *more, status=2)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_text_of_another_encoding_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yolo(tmp_path / "in").unlink()
    (tmp_path / "in" / "classes.txt").write_bytes("Käfer\n".encode("latin-1"))
    convert(tmp_path / "in", tmp_path / "out", "yolo", status=1)
    assert "is no UTF-8 text" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_csv(tmp_path / "in")
    convert(source, tmp_path / "out", "csv")
    convert(source, tmp_path / "out", "csv", status=2)
    assert "exists: choose another --output" in capsys.readouterr().err
