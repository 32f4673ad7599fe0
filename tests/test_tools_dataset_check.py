"""`python -m tools.dataset check`: every kind of problem is planted and found, and a clean data set is clean."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.dataset_helpers import annotation, instances, shared_data, write_data_set, write_split
from tools import dataset
from tools.data.check import check_data_set
from tools.data.check_boxes import check_boxes
from tools.data.check_entries import read_split
from tools.data.kinds import KINDS, Problem
from tools.data.layout import SplitPaths, split_paths

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write a data set of four and three pictures without any problem."""
    write_data_set(tmp_path)
    return tmp_path


def problems(root: Path, split: str = "") -> list[Problem]:
    """Check both splits, or one."""
    names = [split] if split else ["train", "val"]
    return check_data_set([split_paths(root, name) for name in names]).problems


def kinds(root: Path, split: str = "") -> set[str]:
    return {problem.kind for problem in problems(root, split)}


def change(root: Path, edit: Change, split: str = "train") -> None:
    """Edit an annotation file in place."""
    file = split_paths(root, split).annotation_file
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def put(kind: str, place: int, **values: Any) -> Change:
    """Return an edit that sets fields of one entry of a list."""
    return lambda content: content[kind][place].update(values)


def drop(kind: str, place: int, *fields: str) -> Change:
    """Return an edit that removes fields of one entry of a list."""
    return lambda content: [content[kind][place].pop(field) for field in fields]


def add(kind: str, **values: Any) -> Change:
    """Return an edit that appends an entry to a list."""
    return lambda content: content[kind].append(values)


def corners(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["bbox"] = [20, 15, 35, 27]


def relative(content: dict[str, Any]) -> None:
    for place, entry in enumerate(content["annotations"]):
        entry["bbox"] = [0.1 + 0.01 * place, 0.2, 0.3, 0.4]


def no_objects_of_image_one(content: dict[str, Any]) -> None:
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 1]


# kind, edit of the train file whose 8 annotations lie on pictures 1 to 4 of 40 x 30, place and words of the finding.
PLANTED: list[tuple[str, Change, str, str]] = [
    ("annotation_file", lambda content: content.pop("images"), "", "expected a list 'images'"),
    ("malformed_entry", put("images", 0, id="one"), "images[0]", "'one'"),
    ("malformed_entry", add("categories", id=9), "categories[3]", "None"),
    ("malformed_entry", put("annotations", 1, iscrowd="yes"), "annotation 2", "'yes'"),
    ("malformed_entry", put("annotations", 1, area="big"), "annotation 2", "'big'"),
    ("malformed_entry", lambda content: content["annotations"].append(7), "list 'annotations'", "1 entries"),
    ("duplicate_image_id", put("images", 1, id=1), "image 1", "1.png and 2.png"),
    ("duplicate_category_id", put("categories", 1, id=1), "category 1 (dog)", "'cat' and 'dog'"),
    ("duplicate_category_name", put("categories", 1, name="cat"), "category 7 (cat)", "category 1"),
    ("duplicate_file_name", put("images", 1, file_name="1.png"), "image 2 (1.png)", "image 1"),
    ("unknown_image", put("annotations", 2, image_id=99), "annotation 3, image 99", "99"),
    ("unknown_image", put("annotations", 2, image_id=None), "annotation 3, image None", "None"),
    ("unknown_category", put("annotations", 2, category_id=2), "annotation 3, image 2 (2.png)", "2"),
    ("segmentation_only", put("annotations", 2, bbox=None, segmentation=[[1, 1, 5]]), "annotation 3", "no bbox"),
    ("malformed_box", drop("annotations", 2, "bbox"), "annotation 3", "no bbox"),
    ("malformed_box", put("annotations", 2, bbox=[1, 2, 3]), "annotation 3", "[1, 2, 3]"),
    ("malformed_box", put("annotations", 2, bbox=[1, math.nan, 3, 4]), "annotation 3", "nan"),
    ("malformed_box", put("annotations", 2, bbox=[1, 2, "3", 4]), "annotation 3", "'3'"),
    ("corner_boxes", corners, "list 'annotations'", "8 of 8 boxes"),
    ("normalised_boxes", relative, "list 'annotations'", "no number of 8 boxes is above 1"),
    ("empty_box", put("annotations", 2, bbox=[1, 2, 0, 4]), "annotation 3", "[1, 2, 0, 4]"),
    ("empty_box", put("annotations", 2, bbox=[9, 9, -4, 4]), "annotation 3", "[9, 9, -4, 4]"),
    ("outside_box", put("annotations", 2, bbox=[40, 2, 5, 5]), "annotation 3", "40 x 30"),
    ("outside_box", put("annotations", 2, bbox=[-9, 2, 5, 5]), "annotation 3", "40 x 30"),
    ("size_mismatch", put("images", 2, width=41), "image 3 (3.png)", "40 x 30, its entry 41 x 30"),
    ("category_id_range", put("categories", 1, id=10000), "category 10000 (dog)", "0 to 9999"),
    ("category_id_range", put("categories", 1, id=-1), "category -1 (dog)", "0 to 9999"),
    ("split_categories", put("categories", 1, name="wolf"), "category 7 (dog)", "'wolf'"),
    ("split_categories", put("categories", 1, id=8), "category 7 (dog)", "has the id 8"),
    ("split_category_missing", add("categories", id=9, name="fox"), "category 9 (fox)", "not in instances_val"),
    ("image_without_size", drop("images", 2, "width"), "image 3 (3.png)", "width None, height 30"),
    ("category_id_zero", put("categories", 1, id=0), "category 0 (dog)", "label is 0"),
    ("category_id_gaps", put("categories", 1, id=900), "list 'categories'", "901 rows"),
    ("unused_category", add("categories", id=9, name="fox"), "category 9 (fox)", "no object"),
    ("image_without_objects", no_objects_of_image_one, "image 1 (1.png)", "no annotation"),
    ("annotation_ids", put("annotations", 2, id=0), "annotation 0", "id is 0"),
    ("annotation_ids", drop("annotations", 2, "id"), "annotations[2]", "id is None"),
    ("annotation_ids", put("annotations", 2, id=1), "annotation 1", "occurs 2 times"),
    ("over_edge", put("annotations", 2, bbox=[30, 3, 12, 12]), "annotation 3", "2 pixels over"),
    ("tiny_box", put("annotations", 2, bbox=[3, 3, 0.5, 12]), "annotation 3", "0.5"),
    ("duplicate_object", put("annotations", 1, category_id=1), "annotation 2", "as annotation 1"),
    ("area", drop("annotations", 2, "area"), "annotation 3", "no area"),
    ("area", put("annotations", 2, area=400), "annotation 3", "area 400, box 10 x 12"),
    ("crowd", put("annotations", 2, iscrowd=1), "annotation 3", "category 3"),
    ("difficult", put("annotations", 2, difficult=1), "annotation 3", "category 3"),
]  # fmt: skip
# Planted in the files, or in both splits, by the tests below.
ELSEWHERE = {
    *("image_missing", "image_unreadable", "rotated_picture", "exif_orientation", "duplicate_content"),
    *("split_content", "split_file_name", "split_image_id", "unlisted_picture"),
}


def test_check_every_kind_is_planted_somewhere() -> None:
    assert {kind for kind, *_ in PLANTED} | ELSEWHERE == set(KINDS)


def test_check_clean_data_set_is_clean(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(root) == []
    assert dataset.main(["check", "--coco_path", str(root), "--strict"]) == 0
    assert "0 errors, 0 remarks" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "edit", "where", "words"), PLANTED)
def test_check_finds_planted(root: Path, kind: str, edit: Change, where: str, words: str) -> None:
    change(root, edit)
    found = [problem for problem in problems(root) if problem.kind == kind]
    assert any(problem.where.startswith(where) and words in problem.detail for problem in found), found


def test_check_lists_all_problems_of_a_kind(root: Path) -> None:
    change(root, lambda content: [entry.update(bbox=[1, 1, 0, 0]) for entry in content["annotations"]])
    assert sum(problem.kind == "empty_box" for problem in problems(root)) == 8


def test_check_survives_entries_of_any_type(root: Path) -> None:
    change(
        root, lambda content: content["annotations"].append({"id": [], "image_id": {}, "category_id": [], "bbox": 3})
    )
    change(root, put("images", 0, width="40", height=None))
    change(root, add("images", id=True, file_name=3))
    assert {"malformed_box", "unknown_image", "unknown_category", "image_without_size"} <= kinds(root)


@pytest.mark.parametrize("text", ["{ no json", "[]", '"text"', '{"images": 3}'])
def test_check_broken_file_is_one_problem_each(root: Path, text: str) -> None:
    split_paths(root, "train").annotation_file.write_text(text)
    found = problems(root, "train")
    assert found and {problem.kind for problem in found} == {"annotation_file"}


def test_check_missing_annotation_file(root: Path) -> None:
    split_paths(root, "val").annotation_file.unlink()
    assert next(problem.kind for problem in problems(root)) == "annotation_file"


def test_check_missing_and_unlisted_picture(root: Path) -> None:
    (root / "train2017" / "2.png").rename(root / "train2017" / "other.png")
    found = {problem.kind: problem for problem in problems(root)}
    assert found["image_missing"].where == "image 2 (2.png)" and "train2017" in found["image_missing"].detail
    assert found["unlisted_picture"].file.endswith("other.png")


def test_check_missing_folder_is_one_problem(root: Path) -> None:
    shutil.rmtree(root / "train2017")
    assert [problem.kind for problem in problems(root, "train")] == ["image_missing"]


@pytest.mark.parametrize("kept", [0, 20, 500])
def test_check_truncated_picture(root: Path, kept: int) -> None:
    path = root / "train2017" / "2.png"
    path.write_bytes(path.read_bytes()[:kept])
    found = [problem for problem in problems(root) if problem.kind == "image_unreadable"]
    assert [problem.image_id for problem in found] == [2]


def test_check_damage_in_the_middle_needs_decoding(root: Path) -> None:
    path = root / "train2017" / "2.png"
    content = bytearray(path.read_bytes())
    content[300:310] = bytes(10)
    path.write_bytes(content)
    splits = [split_paths(root, "train")]
    assert not check_data_set(splits).problems
    assert [problem.kind for problem in check_data_set(splits, decode=True).problems] == ["image_unreadable"]


@pytest.mark.parametrize(("size", "kind"), [((30, 40), "rotated_picture"), ((40, 30), "exif_orientation")])
def test_check_exif_orientation(root: Path, size: tuple[int, int], kind: str) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / "train2017" / "2.jpg", exif=tag)
    (root / "train2017" / "2.png").unlink()
    change(root, put("images", 1, file_name="2.jpg", width=size[0], height=size[1]))
    found = problems(root)
    assert [problem.image_id for problem in found if problem.kind == kind] == [2]
    assert "size_mismatch" not in {problem.kind for problem in found}


def test_check_pictures_shared_by_both_splits(root: Path) -> None:
    shutil.copy(root / "train2017" / "3.png", root / "val2017" / "102.png")
    leak = [problem for problem in problems(root) if problem.kind == "split_content"]
    assert [(problem.image_id, problem.detail) for problem in leak] == [
        (102, "is image 3 (3.png) of instances_train2017.json")
    ]


def test_check_same_names_and_ids_in_both_splits(root: Path) -> None:
    write_split(root, "val", instances(2, first_id=1))
    assert {"split_content", "split_image_id"} <= kinds(root)
    Image.new("RGB", (40, 30)).save(root / "val2017" / "1.png")
    found = [problem for problem in problems(root) if problem.kind == "split_file_name"]
    assert [problem.image_id for problem in found] == [1] and "contents differ" in found[0].detail
    splits = [split_paths(root, name) for name in ("train", "val")]
    unread = check_data_set(splits, read_images=False).problems
    assert sum("not compared" in problem.detail for problem in unread) == 2


def test_check_copies_within_a_split(root: Path) -> None:
    shutil.copy(root / "train2017" / "3.png", root / "train2017" / "4.png")
    found = [problem for problem in problems(root) if problem.kind == "duplicate_content"]
    assert [(problem.image_id, problem.detail) for problem in found] == [(4, "same sha256 as image 3 (3.png)")]


def test_check_boxes_of_correct_files_are_not_taken_for_corners(root: Path) -> None:
    # One long box over the edge is a remark, not a wrong format.
    change(root, put("annotations", 2, bbox=[20, 3, 25, 12]))
    assert kinds(root) == {"over_edge"}


def test_check_uses_the_size_of_the_file_when_the_entry_lies(root: Path) -> None:
    change(root, put("images", 1, width=400, height=300))
    change(root, put("annotations", 2, bbox=[100, 3, 10, 12]))
    assert kinds(root) == {"size_mismatch", "outside_box"}


def test_check_prints_and_writes_what_it_found(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    change(root, lambda content: [entry.update(bbox=[1, 1, 0, 2]) for entry in content["annotations"]])
    file = tmp_path / "problems.json"
    assert dataset.main(["check", "--coco_path", str(root), "--show", "2", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "== errors ==" in out and "8 x box without area [empty_box]" in out and "and 6 more" in out
    assert "instances_train2017.json: annotation 1, image 1 (1.png): bbox [1, 1, 0, 2]" in out
    entries = json.loads(file.read_text())
    assert sum(entry["kind"] == "empty_box" for entry in entries) == 8
    assert {"severity", "remedy", "image_id", "where", "file"} <= set(entries[0])


def test_check_remarks_count_only_with_strict(root: Path) -> None:
    change(root, put("annotations", 2, iscrowd=1))
    alone = ["check", str(split_paths(root, "train").annotation_file), "--images", str(root / "train2017")]
    assert dataset.main(alone) == 0
    assert dataset.main([*alone, "--strict"]) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "either an annotation file"),
        (["a.json", "--coco_path", "x"], "either an annotation file"),
        (["nowhere.json"], "no annotation file nowhere.json"),
        (["--coco_path", "nowhere"], "no folder nowhere"),
    ],
)
def test_check_wrong_usage_ends_with_two(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset.main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_check_wrong_option_ends_with_two() -> None:
    with pytest.raises(SystemExit) as stop:
        dataset.main(["check", "--imagse", "x"])
    assert stop.value.code == 2


def test_check_reads_one_hundred_thousand_annotations(tmp_path: Path) -> None:
    content = instances(5000)
    content["annotations"] = [
        annotation(n, 1 + n // 20, (1, 3, 7)[n % 3], bbox=[n % 20, 3, 10, 12]) for n in range(100_000)
    ]
    content["annotations"][77_777]["bbox"] = [1, 1, 0, 1]
    file = write_split(tmp_path, "train", content, pictures=False)
    split, entry_problems = read_split(SplitPaths("train", file, None))
    found = entry_problems + check_boxes(split)
    assert [(problem.kind, problem.where) for problem in found if problem.kind != "annotation_ids"] == [
        ("empty_box", "annotation 77777, image 3889 (3889.png)")
    ]


def test_check_photographs() -> None:
    assert problems(shared_data("bccd")) == []
    coco = shared_data("coco_tiny")
    assert kinds(coco) == {"crowd", "unused_category"}
    assert sum(problem.kind == "crowd" for problem in problems(coco)) == 7
