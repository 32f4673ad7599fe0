"""`python -m tools.dataset stats|split|preview`: numbers, divisions and pictures of a data set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets import _LAYOUT as MAIN_LAYOUT
from tests.dataset_helpers import annotation, instances, shared_data, write_data_set, write_split
from tools import dataset
from tools.data.check import check_data_set
from tools.data.layout import split_paths
from tools.data.sheet import Cell, draw_cell
from tools.data.split import divide, group_pictures, split_content
from tools.data.stats import count_split, summarise
from util.errors import OptionError


def test_layout_is_that_of_the_program(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder, file = MAIN_LAYOUT[split]
        assert split_paths(tmp_path, split)[1:] == (tmp_path / "annotations" / file, tmp_path / folder)


# ---- stats


def counted(root: Path, **changes: Any) -> dict[str, Any]:
    """Write three pictures of 40 x 30 with known objects and return the numbers."""
    content = instances(3)
    content["annotations"] = [
        annotation(1, 1, 1, bbox=[0, 0, 20, 10], area=200),
        annotation(2, 1, 3, bbox=[0, 0, 40, 30], area=1200),
        annotation(3, 1, 1, bbox=[30, 0, 20, 10], area=200),
        annotation(4, 2, 1, bbox=[0, 0, 1, 1], area=1, iscrowd=1),
        annotation(5, 2, 1, bbox=[50, 0, 10, 10], area=100),
    ]
    write_split(root, "train", content)
    counts = count_split(split_paths(root, "train"), scale=60, max_size=100)
    return summarise(counts, **{"num_queries": 2, "groups": 5, **changes})


def test_stats_count_what_is_trained_on(tmp_path: Path) -> None:
    numbers = counted(tmp_path)
    assert (numbers["images"], numbers["objects"], numbers["images_without_objects"]) == (3, 3, 2)
    assert (numbers["crowd_regions"], numbers["boxes_dropped"]) == (1, 1)
    assert numbers["objects_per_image"] == pytest.approx({"mean": 1, "min": 0, "median": 0, "p95": 2.7, "max": 3})
    assert numbers["images_with_more_objects_than_queries"] == 1
    assert numbers["classes"] == {
        "cat": {"id": 1, "objects": 2, "images": 1},
        "cow": {"id": 3, "objects": 1, "images": 1},
        "dog": {"id": 7, "objects": 0, "images": 0},
    }


def test_stats_sizes_before_and_after_the_resize(tmp_path: Path) -> None:
    numbers = counted(tmp_path)
    # 40 x 30 becomes 80 x 60: areas grow fourfold, 200 to 800 and 1200 to 4800; the border is at 1024.
    assert numbers["sizes_as_annotated"] == {"small": 2, "medium": 1, "large": 0}
    assert numbers["sizes_after_resize"] == {"small": 2, "medium": 1, "large": 0}
    counts = count_split(split_paths(tmp_path, "train"), scale=90, max_size=200)
    after = summarise(counts, num_queries=2, groups=5)["sizes_after_resize"]
    assert after == {"small": 0, "medium": 2, "large": 1}  # ninefold: 1800, 10800
    # The box that reaches over the edge is cut to 10 x 10.
    assert numbers["aspect_ratio"]["min"] == 1 and numbers["aspect_ratio"]["max"] == 2


def test_stats_denoising_queries_are_groups_times_most_objects(tmp_path: Path) -> None:
    numbers = counted(tmp_path, num_queries=10, groups=4)["denoising"]
    assert (numbers["denoising_queries"], numbers["all_queries"]) == (12, 22)
    assert numbers["attention_bytes_per_image_and_layer"] == 8 * 22 * 22 * 4


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_stats_table_plot_and_json(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_data_set(tmp_path)
    plot, file = tmp_path / f"stats{suffix}", tmp_path / "stats.json"
    assert dataset.main(["stats", "--coco_path", str(tmp_path), "--plot", str(plot), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "denoising: 5 groups x 2 objects = 10 queries beside 300" in out
    numbers = json.loads(file.read_text())
    assert numbers["train"]["objects"] == 8 and numbers["val"]["objects"] == 6
    if suffix == ".png":
        with Image.open(plot) as image:
            assert image.width > 1000
    else:
        assert plot.read_text().lstrip().startswith("<?xml")


def test_stats_of_a_set_without_any_object(tmp_path: Path) -> None:
    file = write_split(tmp_path, "train", {**instances(2), "annotations": []})
    assert dataset.main(["stats", str(file), "--plot", str(tmp_path / "stats.png")]) == 0


def test_stats_read_missing_sizes_from_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_split(tmp_path, "train", instances(2))
    content = json.loads(file.read_text())
    del content["images"][1]["width"]
    file.write_text(json.dumps(content))
    assert dataset.main(["stats", str(file)]) == 1
    assert "pass --images FOLDER" in capsys.readouterr().err
    assert count_split(split_paths(tmp_path, "train")).picture_wh.tolist() == [[40, 30], [40, 30]]


def test_stats_agree_with_what_is_known_of_photographs() -> None:
    numbers = summarise(count_split(split_paths(shared_data("bccd"), "train")), num_queries=300, groups=5)
    assert (numbers["images"], numbers["objects"]) == (292, 3941)
    assert [entry["objects"] for entry in numbers["classes"].values()] == [3348, 301, 292]


# ---- split


def many_pictures(num: int = 200, seed: int = 0) -> dict[str, Any]:
    """Return annotations of common, rarer and rare classes; names are those of frames of 25 videos."""
    rng = np.random.default_rng(seed)
    content = instances(num)
    for place, image in enumerate(content["images"]):
        image["file_name"] = f"video{place % 25:02d}_frame{place // 25}.png"
    content["annotations"] = []
    for image in content["images"]:
        for category, share in ((1, 0.9), (3, 0.3), (7, 0.05)):
            if rng.random() < share:
                content["annotations"].append(annotation(len(content["annotations"]) + 1, image["id"], category))
    return content


def present(content: dict[str, Any]) -> Counter[int]:
    """Return in how many pictures each category is."""
    return Counter(c for _, c in {(entry["image_id"], entry["category_id"]) for entry in content["annotations"]})


def test_split_keeps_everything_once_and_the_shares() -> None:
    content = many_pictures()
    parts = split_content(content, (0.7, 0.2, 0.1))
    for key in ("images", "annotations"):
        ids = [entry["id"] for part in parts for entry in part[key]]
        assert sorted(ids) == [entry["id"] for entry in content[key]]
    whole = present(content)
    for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
        assert part["categories"] == content["categories"]
        known = {image["id"] for image in part["images"]}
        assert all(entry["image_id"] in known for entry in part["annotations"])
        # Whole pictures cannot come nearer than half a picture; this seed comes within one for all classes.
        assert all(abs(present(part)[category] - fraction * whole[category]) <= 1 for category in whole)
        assert abs(len(part["images"]) - fraction * 200) <= 1


def test_split_is_better_than_chance_for_rare_classes() -> None:
    errors, by_chance = [], []
    for seed in range(10):
        content = many_pictures(seed=seed)
        whole = present(content)[7]
        errors.append(abs(present(split_content(content, (0.8, 0.2), seed=seed)[1])[7] - 0.2 * whole))
        chosen = np.random.default_rng(seed).random(200) < 0.2
        ids = {image["id"] for image, taken in zip(content["images"], chosen, strict=True) if taken}
        drawn = sum(e["category_id"] == 7 and e["image_id"] in ids for e in content["annotations"])
        by_chance.append(abs(drawn - 0.2 * whole))
    assert max(errors) <= 1 < max(by_chance)


def test_split_is_decided_by_the_seed() -> None:
    content = many_pictures()
    one, same, other = (split_content(content, (0.8, 0.2), seed=seed)[1] for seed in (1, 1, 2))
    assert one == same and one != other


def test_split_keeps_groups_together() -> None:
    parts = split_content(many_pictures(), (0.8, 0.2), group_by=r"^(.+)_frame")
    videos = [{image["file_name"].split("_")[0] for image in part["images"]} for part in parts]
    assert not videos[0] & videos[1]
    assert len(parts[1]["images"]) == 8 * len(videos[1]) and 3 <= len(videos[1]) <= 7


def test_divide_handles_groups_without_any_class() -> None:
    parts = divide(np.zeros((10, 2), dtype=np.int64), np.ones(10, dtype=np.int64), (0.5, 0.5), seed=0)
    assert Counter(parts) == {0: 5, 1: 5}


def test_group_pictures_wants_every_name_matched() -> None:
    assert group_pictures(["a_1", "b_1", "a_2"], r"^._") == [0, 1, 0]
    with pytest.raises(OptionError, match="does not match 1 of 2 file names, such as b"):
        group_pictures(["a_1", "b"], r"^(.)_")
    with pytest.raises(OptionError, match="is no regular expression"):
        group_pictures(["a"], "(")


@pytest.mark.parametrize("link", [False, True])
def test_split_writes_a_layout_that_checks_clean(tmp_path: Path, link: bool) -> None:
    file = write_split(tmp_path / "all", "train", instances(20))
    out = tmp_path / "out"
    words = ["split", str(file), "--fractions", "0.75", "0.25", "--output", str(out), "--seed", "3"]
    assert dataset.main([*words, "--images", str(tmp_path / "all" / "train2017"), *(["--link"] if link else [])]) == 0
    assert check_data_set([split_paths(out, name) for name in ("train", "val")]).problems == []
    assert len(list((out / "val2017").iterdir())) == 5
    assert all(path.is_symlink() == link for path in (out / "val2017").iterdir())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--fractions", "0.8", "0.3"), "sum 1"),
        (("--fractions", "1"), "two or more"),
        (("--names", "train"), "as many different --names"),
        (("--link",), "--link needs --images"),
        (("--group_by", "x"), "does not match 4 of 4"),
    ],
)
def test_split_wrong_usage(
    tmp_path: Path, more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_split(tmp_path, "train", instances(4), pictures=False)
    assert dataset.main(["split", str(file), "--output", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_split_refuses_an_empty_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_split(tmp_path, "train", instances(1), pictures=False)
    assert dataset.main(["split", str(file), "--output", str(tmp_path / "out")]) == 1
    assert "leave a part without any" in capsys.readouterr().err


# ---- preview


def drawn(root: Path, *more: str, status: int = 0) -> tuple[int, int]:
    """Draw the train split and return the size of the sheet."""
    paths = split_paths(root, "train")
    words = ["preview", str(paths.annotation_file), "--images", str(paths.image_folder), "--output"]
    assert dataset.main([*words, str(root / "sheet.png"), *more]) == status
    if status:
        return 0, 0
    with Image.open(root / "sheet.png") as image:
        return image.size


def test_preview_draws_boxes_in_the_colour_of_their_class(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    size = drawn(tmp_path, "--image_ids", "2", "3", "--width", "80", "--columns", "2")
    assert size == (2 * 86 + 6, 60 + 34 + 6 + 6)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    # Picture 2 has a box 3, 3, 10, 12 of category 3 (second of 1, 3, 7: sky blue), twice as large on the sheet.
    assert pixels[6 + 6, 6 + 6 + 10].tolist() == [0x56, 0xB4, 0xE9]


def test_preview_choice_depends_on_the_seed(tmp_path: Path) -> None:
    write_split(tmp_path, "train", instances(12))
    sheets = []
    for seed in ("1", "1", "2"):
        drawn(tmp_path, "--count", "3", "--seed", seed, "--width", "64")
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_preview_of_both_splits_as_jpeg(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    assert dataset.main(["preview", "--coco_path", str(tmp_path), "--output", str(tmp_path / "p" / "sheet.jpg")]) == 0
    with Image.open(tmp_path / "p" / "sheet.jpg") as image:
        assert image.format == "JPEG" and image.width == 4 * 326 + 6


def test_preview_only_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_split(tmp_path, "train", instances(6))
    drawn(tmp_path, "--only_problems", status=1)
    assert "has a problem" in capsys.readouterr().err
    content = json.loads(file.read_text())
    content["annotations"][5]["bbox"] = [1, 1, 0, 5]
    file.write_text(json.dumps(content))
    assert drawn(tmp_path, "--only_problems") == (332, 240 + 34 + 6 + 6)


def test_preview_keeps_names_apart() -> None:
    boxes = [(5, 5, 60, 60)] * 30
    picture = Image.new("RGB", (80, 80))
    cell = Cell(picture, boxes, [1] * 30, ["name"] * 30, [False] * 30, "", "")
    one = Cell(picture, boxes[:1], [1], ["name"], [False], "", "")
    # Equal boxes have room for a few names, above each other; the others have their frame only.
    crowded, alone = (np.asarray(draw_cell(c, ["#e69f00"] * 30, width=80)) for c in (cell, one))
    filled = [(np.abs(p.astype(int) - [0xE6, 0x9F, 0]).sum(-1) == 0).sum() for p in (crowded, alone)]
    assert filled[1] < filled[0] < 6 * filled[1]


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (("--image_ids", "77"), 2, "has no image 77"),
        (("--image_ids", "1", "--only_problems"), 2, "without --only_problems"),
        (("--output", "sheet.gif"), 2, "ends in .png or .jpg"),
        (("--count", "0"), 2, "at least 1"),
    ],
)
def test_preview_wrong_usage(
    tmp_path: Path, more: tuple[str, ...], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data_set(tmp_path)
    drawn(tmp_path, *more, status=status)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_preview_names_a_broken_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data_set(tmp_path)
    (tmp_path / "train2017" / "2.png").write_bytes(b"x")
    drawn(tmp_path, "--image_ids", "2", status=1)
    assert "2.png: not a readable picture" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", dataset.SUBCOMMANDS)
def test_help_shows_an_example(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        dataset.main([subcommand, "--help"])
    assert stop.value.code == 0
    assert f"python -m tools.dataset {subcommand} " in capsys.readouterr().out
