"""Annotation files and targets: the official conversion, and a sentence for everything that is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.annotations import DatasetError, load_annotation_file, make_target, read_categories, read_objects
from datasets.coco_names import COCO_NAMES
from datasets.labels import LabelMap
from tests.dataset_helpers import instances, shared_data, write_split
from tests.golden_recipe import load_json


def test_target_matches_official_conversion() -> None:
    golden = load_json("transforms.json")["annotation_conversion"]
    width, height = golden["image_wh"]
    target = make_target(read_objects(golden["annotations"]), image_id=42, width=width, height=height)
    assert {name: value.tolist() for name, value in target.items()} == golden["output"]


def test_empty_target_matches_official_shapes_and_types() -> None:
    golden = load_json("transforms.json")["annotation_conversion_empty"]
    target = make_target(read_objects([]), image_id=43, width=200, height=100)
    found = {name: [value.tolist(), list(value.shape), str(value.dtype)] for name, value in target.items()}
    assert found == golden


def test_read_objects_fills_area_and_crowd() -> None:
    objects = read_objects([{"bbox": [1, 2, 3, 4], "category_id": 5}])
    assert objects.area.tolist() == [12.0]
    assert objects.iscrowd.tolist() == [0]


def test_load_fills_missing_fields_and_numbers_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = instances(2)
    for entry in content["annotations"]:
        del entry["area"], entry["iscrowd"]
        entry["id"] = 0
    with caplog.at_level(logging.WARNING):
        loaded = load_annotation_file(write_split(tmp_path, "train", content, pictures=False))
    assert [entry["id"] for entry in loaded["annotations"]] == [1, 2, 3, 4]
    assert all(entry["area"] == 120 and entry["iscrowd"] == 0 for entry in loaded["annotations"])
    assert "numbered 1 to 4" in caplog.text


def test_load_keeps_good_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = instances(2)
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = 900 - number
    loaded = load_annotation_file(write_split(tmp_path, "train", content, pictures=False))
    assert loaded["annotations"][0]["id"] == 900
    assert not caplog.records


def broken(**changes: Any) -> dict[str, Any]:
    """An annotation file whose first entry of some lists is changed: ``images_file_name=3`` and the like."""
    content = instances(2)
    for key, value in changes.items():
        group, field = key.split("_", 1)
        content[group][0][field] = value
    return content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{ no json", "is no JSON"),
        (json.dumps(instances())[:200], "is no JSON"),
        ("[]", "expected a JSON object"),
        ('{"images": [], "annotations": []}', "a list 'categories'"),
        ('{"images": {}, "annotations": [], "categories": []}', "a list 'images'"),
        ('{"images": [1], "annotations": [], "categories": []}', "a list 'images'"),
        (broken(images_id=2), "image id 2 occurs 2 times"),
        (broken(categories_id=7), "category id 7 occurs 2 times"),
        (broken(images_id="a"), "every image needs an integer 'id', found 'a'"),
        (broken(images_id=None), "every image needs an integer 'id', found None"),
        (broken(images_file_name=3), "image 1 needs a 'file_name', found 3"),
        (broken(categories_name=None), "category 1 needs a 'name', found None"),
        (broken(annotations_image_id=77), "annotation 1 belongs to image 77, which the file does not list (1 such"),
        (broken(annotations_category_id=2), "annotation 1 belongs to category 2"),
        (broken(annotations_category_id="cat"), "annotation 1 belongs to category 'cat'"),
        (broken(annotations_bbox=[1, 2, 3]), "annotation 1 needs a 'bbox' of four finite numbers"),
        (broken(annotations_bbox=[1, 2, 3, float("nan")]), "annotation 1 needs a 'bbox' of four finite numbers"),
        (broken(annotations_bbox=None), "annotation 1 needs a 'bbox' of four finite numbers"),
    ],
)
def test_load_refuses_bad_files_with_a_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    path = write_split(tmp_path, "train", content, pictures=False)
    with pytest.raises(DatasetError) as caught:
        load_annotation_file(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_refuses_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no annotation file"):
        load_annotation_file(tmp_path / "instances_train2017.json")
    with pytest.raises(DatasetError, match="no annotation file"):
        read_categories(tmp_path / "instances_train2017.json")


def test_read_categories_refuses_none(tmp_path: Path) -> None:
    path = write_split(tmp_path, "train", {"images": []}, pictures=False)
    with pytest.raises(DatasetError, match="a list 'categories'"):
        read_categories(path)


def test_read_categories_finds_the_list_wherever_it_is(tmp_path: Path) -> None:
    content = instances(2)
    first = {"categories": content["categories"], **content}
    nested = {"info": {"categories": [{"id": 99, "name": "no class"}]}, **content}
    for layout in (content, first, nested):
        path = write_split(tmp_path, "train", layout, pictures=False)
        assert read_categories(path) == content["categories"]


def test_read_categories_refuses_a_truncated_list(tmp_path: Path) -> None:
    text = json.dumps(instances(2))
    for end in (text.index('"dog"'), text.index('"categories"')):
        path = write_split(tmp_path, "train", text[:end], pictures=False)
        with pytest.raises(DatasetError, match="is no JSON"):
            read_categories(path)


CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 3, "name": "cow"}]


def test_label_map_ids_keeps_category_ids() -> None:
    labels = LabelMap(CATEGORIES)
    assert labels.num_classes == 8
    assert labels.class_names == ["N/A", "cat", "N/A", "cow", "N/A", "N/A", "N/A", "dog"]
    assert labels.label_to_category is None
    assert labels.to_labels(np.array([7, 1])).tolist() == [7, 1]
    assert labels.to_categories(torch.tensor([[7, 0]])).tolist() == [[7, 0]]


def test_label_map_contiguous_maps_there_and_back() -> None:
    labels = LabelMap(CATEGORIES, mapping="contiguous", num_classes=5)
    assert labels.class_names == ["cat", "cow", "dog", "N/A", "N/A"]
    assert labels.label_to_category == {0: 1, 1: 3, 2: 7}
    assert labels.to_labels(np.array([7, 1, 3])).tolist() == [2, 0, 1]
    assert labels.to_categories(torch.tensor([[2, 0], [1, 4]])).tolist() == [[7, 1], [3, -1]]


@pytest.mark.parametrize(
    ("categories", "settings", "sentence"),
    [
        (CATEGORIES, {"num_classes": 7}, "need 8 classes, --num_classes is 7"),
        (CATEGORIES, {"num_classes": 2, "mapping": "contiguous"}, "need 3 classes"),
        (CATEGORIES, {"mapping": "sorted"}, "--label_mapping is one of"),
        ([*CATEGORIES, {"id": 7, "name": "wolf"}], {}, "'dog' in one annotation file and 'wolf' in the other"),
        ([{"id": -1, "name": "x"}], {}, "pass --label_mapping contiguous"),
        ([{"id": 123456789, "name": "x"}], {}, "pass --label_mapping contiguous"),
        ([], {}, "lists no category"),
    ],
)
def test_label_map_refuses_with_a_sentence(categories: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DatasetError) as caught:
        LabelMap(categories, **settings)
    assert sentence in str(caught.value)


def test_coco_names_are_those_of_the_annotation_file() -> None:
    path = shared_data("coco_tiny") / "annotations" / "instances_val2017.json"
    assert {entry["id"]: entry["name"] for entry in read_categories(path)} == COCO_NAMES
