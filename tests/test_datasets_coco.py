"""Data sets in COCO's layout: what they yield, how labels map, and what happens to bad input."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DatasetError, build_data_loader, build_dataset, get_coco_api_from_dataset
from datasets.coco import CocoDetection
from datasets.samplers import EvalBatchSampler
from tests.dataset_helpers import (
    annotation,
    instances,
    options,
    shared_data,
    small_options,
    write_data_set,
    write_split,
)


def test_samples_have_the_agreed_form(tmp_path: Path) -> None:
    dataset = build_dataset("train", small_options(write_data_set(tmp_path)))
    assert len(dataset) == 4
    image, target = dataset[2]
    assert image.dtype == torch.float32
    assert target["image_id"].tolist() == [3]
    assert target["orig_size"].tolist() == [30, 40]
    assert target["size"].tolist() == list(image.shape[1:])
    assert target["labels"].dtype == torch.int64
    assert target["boxes"].shape == (len(target["labels"]), 4)
    assert bool(((target["boxes"] >= 0) & (target["boxes"] <= 1)).all())


def test_val_targets_are_the_annotations(tmp_path: Path) -> None:
    dataset = build_dataset("val", small_options(write_data_set(tmp_path)))
    image, target = dataset[1]
    # Picture 102 is 40 x 30 and becomes 42 x 32; its objects are number 3 and 4, both at (3, 3), 10 x 12.
    assert list(image.shape) == [3, 32, 42]
    expected = torch.tensor([[8 / 40, 9 / 30, 10 / 40, 12 / 30]] * 2)
    torch.testing.assert_close(target["boxes"], expected, rtol=1e-6, atol=0)  # one float32 rounding per operation
    assert target["labels"].tolist() == [3, 7]
    torch.testing.assert_close(target["area"], torch.full((2,), 100.0 * 42 / 40 * 32 / 30), rtol=1e-6, atol=0)


def test_images_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    content = instances(4)
    content["images"].reverse()
    content["annotations"].reverse()
    write_split(tmp_path, "train", content)
    write_split(tmp_path, "val", instances(1, first_id=101))
    dataset = build_dataset("train", small_options(tmp_path))
    assert dataset.ids == [1, 2, 3, 4]
    assert [int(dataset[i][1]["image_id"]) for i in range(4)] == [1, 2, 3, 4]
    # Within an image the order of the file stays: reversed here.
    objects = dataset._objects.rows(slice(dataset._first[0], dataset._first[1]))
    assert objects.categories.tolist() == [3, 1]


def test_classes_are_those_of_both_splits(tmp_path: Path) -> None:
    write_split(tmp_path, "train", instances(2))
    val = instances(1, first_id=101)
    val["categories"].append({"id": 9, "name": "owl"})
    write_split(tmp_path, "val", val)
    train_set = build_dataset("train", small_options(tmp_path))
    val_set = build_dataset("val", small_options(tmp_path, dataset_file="pets"))
    assert train_set.num_classes == val_set.num_classes == 10
    assert train_set.class_names == val_set.class_names
    assert train_set.class_names[9] == "owl"
    assert build_dataset("train", small_options(tmp_path, num_classes=20)).num_classes == 20


def test_contiguous_labels_map_back_to_categories(tmp_path: Path) -> None:
    args = small_options(write_data_set(tmp_path), label_mapping="contiguous")
    dataset = build_dataset("val", args)
    assert dataset.num_classes == 3
    assert dataset.class_names == ["cat", "cow", "dog"]
    assert dataset.label_to_category == {0: 1, 1: 3, 2: 7}
    labels = dataset[1][1]["labels"]
    assert labels.tolist() == [1, 2]
    assert dataset.labels_to_categories(labels).tolist() == [3, 7]
    assert get_coco_api_from_dataset(dataset).anns[3]["category_id"] == 3


def test_images_without_objects_stay(tmp_path: Path) -> None:
    content = instances(3)
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 2]
    write_split(tmp_path, "train", content)
    dataset = build_dataset("train", small_options(tmp_path))
    assert len(dataset) == 3
    assert dataset[1][1]["boxes"].shape == (0, 4)


def test_unusable_boxes_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = instances(2)
    content["annotations"] += [
        annotation(11, 2, bbox=[50, 3, 10, 12]),
        annotation(12, 2, bbox=[5, 3, 0, 12]),
        annotation(13, 2, bbox=[35, 25, 100, 100]),
        annotation(14, 2, bbox=[5, 5, -3, 5]),
        annotation(15, 2, bbox=[50, 3, 10, 12], iscrowd=1),
    ]
    write_split(tmp_path, "val", content)
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset("val", small_options(tmp_path))
    assert "3 of 9 boxes lie outside" in caplog.text
    boxes = dataset[1][1]["boxes"]
    assert len(boxes) == 3
    torch.testing.assert_close(boxes[2], torch.tensor([37.5 / 40, 27.5 / 30, 5 / 40, 5 / 30]), rtol=1e-6, atol=0)


def test_remove_difficult_leaves_them_out_of_training_and_evaluation(tmp_path: Path) -> None:
    content = instances(2)
    content["annotations"][0]["difficult"] = 1
    content["annotations"][2]["ignore"] = 1
    content["annotations"][3]["difficult"] = 0
    write_split(tmp_path, "val", content)
    kept = build_dataset("val", small_options(tmp_path))
    removed = build_dataset("val", small_options(tmp_path, remove_difficult=True))
    assert [len(kept[i][1]["labels"]) for i in range(2)] == [2, 2]
    assert [len(removed[i][1]["labels"]) for i in range(2)] == [1, 1]
    crowd = {number: entry["iscrowd"] for number, entry in get_coco_api_from_dataset(removed).anns.items()}
    assert crowd == {1: 1, 2: 0, 3: 1, 4: 0}


def test_cache_mode_reads_the_same_samples_without_the_files(tmp_path: Path) -> None:
    root = write_data_set(tmp_path)
    plain = build_dataset("val", small_options(root))[0][0]
    cached = build_dataset("val", small_options(root, cache_mode=True))
    for file in (root / "val2017").iterdir():
        file.unlink()
    assert torch.equal(cached[0][0], plain)


@pytest.mark.parametrize("name", ["coco_path", "train2017", "annotations"])
def test_missing_folders_are_named(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    if name != "coco_path":
        write_data_set(root)
        for file in (root / name).iterdir():
            file.unlink()
        (root / name).rmdir()
    with pytest.raises(DatasetError, match=name if name != "coco_path" else "no folder"):
        build_dataset("train", small_options(root))


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    root = write_data_set(tmp_path)
    file = root / "val2017" / "102.png"
    file.write_bytes(file.read_bytes()[:400])
    dataset = build_dataset("val", small_options(root))
    assert dataset[0][0].shape[0] == 3
    with pytest.raises(DatasetError, match=r"102\.png \(image id 102\)"):
        dataset[1]


def error_of(loader: Iterable[Any]) -> str:
    # Not pytest.raises: what it catches keeps the loader alive, whose workers then take 5 seconds each to stop.
    try:
        list(loader)
    except DatasetError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_picture_is_named_by_the_loader(tmp_path: Path, num_workers: int) -> None:
    root = write_data_set(tmp_path)
    (root / "val2017" / "102.png").write_bytes(b"")
    dataset = build_dataset("val", small_options(root))
    loader = build_data_loader(dataset, batch_sampler=EvalBatchSampler(3, batch_size=1), num_workers=num_workers)
    message = error_of(loader)
    assert "102.png (image id 102): not a readable picture" in message
    assert "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_pictures_are_skipped_and_counted(
    tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_data_set(tmp_path, num_val=5)
    (root / "val2017" / "102.png").write_bytes(b"no picture")
    (root / "val2017" / "105.png").unlink()
    dataset = build_dataset("val", small_options(root, skip_bad_images=True))
    loader = build_data_loader(dataset, batch_sampler=EvalBatchSampler(5, batch_size=2), num_workers=num_workers)
    for _ in range(2):
        ids = [int(target["image_id"]) for _, targets in loader for target in targets]
        assert ids == [101, 103, 103, 104, 101]
    assert dataset.num_bad_images == 2
    if num_workers == 0:
        assert sum("skipped bad picture" in record.message for record in caplog.records) == 2
        assert "102.png (image id 102)" in caplog.text


def test_no_readable_picture_is_an_error(tmp_path: Path) -> None:
    root = write_data_set(tmp_path)
    for file in (root / "val2017").iterdir():
        file.write_bytes(b"no picture")
    dataset = build_dataset("val", small_options(root, skip_bad_images=True))
    with pytest.raises(DatasetError, match="none of the 3 pictures"):
        dataset[0]


def test_rotated_annotation_sizes_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_data_set(tmp_path)
    for name in ("101", "102"):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (30, 40)).save(root / "val2017" / f"{name}.png", exif=exif)
    dataset = build_dataset("val", small_options(root))
    _, target = dataset[0]
    dataset[1]
    # The pixels as stored count, 30 x 40, not the turned 40 x 30 of the file.
    assert target["orig_size"].tolist() == [40, 30]
    assert sum("EXIF rotation is not applied" in record.message for record in caplog.records) == 1
    assert "101.png is 30x40 as stored, the annotation file says 40x30" in caplog.text


@pytest.mark.parametrize(
    ("image_set", "changes", "sentence"),
    [
        ("validation", {}, "image set is one of train, val, test"),
        ("train", {"dataset_file": "coco_panoptic"}, "coco_panoptic"),
        ("train", {"num_classes": 3}, "need 8 classes, --num_classes is 3"),
        ("train", {"data_aug_scales2_crop": [300, 400]}, "smallest crop window"),
        ("val", {"eval_scale": 0}, "sizes must be positive"),
    ],
)
def test_bad_options_get_a_sentence(tmp_path: Path, image_set: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DatasetError, match=sentence):
        build_dataset(image_set, small_options(write_data_set(tmp_path), **changes))


def test_file_without_images_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", instances(2) | {"images": [], "annotations": []})
    with pytest.raises(DatasetError, match="lists no image"):
        build_dataset("train", small_options(tmp_path))


def test_test_set_needs_no_annotations(tmp_path: Path) -> None:
    root = write_data_set(tmp_path)
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "image_info_test-dev2017.json")
    (root / "val2017").rename(root / "test2017")
    content = instances(3, first_id=101)
    del content["annotations"]
    file = write_split(root, "val", content)
    file.rename(root / "annotations" / "image_info_test-dev2017.json")
    dataset = build_dataset("test", small_options(root))
    assert len(dataset) == 3
    assert dataset[0][1]["boxes"].shape == (0, 4)


def test_coco_tiny_loads() -> None:
    root = shared_data("coco_tiny")
    train_set = build_dataset("train", options(coco_path=str(root)))
    val_set = build_dataset("val", options(coco_path=str(root), eval_scale=100))
    assert (len(train_set), len(val_set)) == (26, 25)
    assert train_set.num_classes == val_set.num_classes == 91
    assert sum(name != "N/A" for name in val_set.class_names) == 80
    # 213 objects, 2 of them crowd regions.
    assert sum(len(val_set[i][1]["labels"]) for i in range(25)) == 211
    assert build_dataset("val", options(coco_path=str(root), label_mapping="contiguous")).num_classes == 80


def test_coco_tiny_targets_equal_a_direct_reading() -> None:
    dataset = build_dataset("val", options(coco_path=str(shared_data("coco_tiny"))))
    coco = get_coco_api_from_dataset(dataset)
    for index in range(3):
        image, target = dataset[index]
        objects = [entry for entry in coco.imgToAnns[dataset.ids[index]] if not entry["iscrowd"]]
        height, width = target["orig_size"].tolist()
        expected = [
            ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            for x, y, w, h in (e["bbox"] for e in objects)
        ]
        assert target["labels"].tolist() == [entry["category_id"] for entry in objects]
        # float32 against float64, a handful of roundings on values below 1.
        np.testing.assert_allclose(target["boxes"].numpy(), np.array(expected).reshape(-1, 4), rtol=0, atol=1e-6)
        assert min(image.shape[1:]) == 800 or max(image.shape[1:]) == 1333


def test_bccd_loads() -> None:
    root = shared_data("bccd")
    train_set: CocoDetection = build_dataset("train", options(coco_path=str(root), dataset_file="bccd"))
    assert len(train_set) == 292
    assert train_set.num_classes == 4
    assert train_set.class_names == ["N/A", "RBC", "WBC", "Platelets"]
    assert int(np.diff(train_set._first).sum()) == 3941
