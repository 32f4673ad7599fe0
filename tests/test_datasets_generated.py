"""The generated data set: deterministic, atomic, and annotated exactly."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from datasets import DatasetError, build_dataset, generated
from datasets.coco import index_annotations
from datasets.generated import ensure_generated
from datasets.scenes import SCENE_SIZE, SHAPE_CATEGORIES, render_scene
from tests.dataset_helpers import options

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_generated(tmp_path_factory.mktemp("cache"), num_train=120, num_val=12)


@pytest.fixture(scope="module")
def coco(root: Path) -> COCO:
    return index_annotations(json.loads((root / "annotations" / "instances_train2017.json").read_text()))


def files_of(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_same_numbers_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = ensure_generated(tmp_path, num_train=120, num_val=12)
    assert files_of(again) == files_of(root)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(root: Path, tmp_path: Path) -> None:
    small = files_of(ensure_generated(tmp_path, num_train=3, num_val=1))
    large = files_of(root)
    pictures = [name for name in small if name.endswith(".jpg")]
    assert len(pictures) == 4
    assert all(small[name] == large[name] for name in pictures)


def test_splits_share_no_picture_and_no_id(root: Path) -> None:
    files = files_of(root)
    pictures = [name for name in files if name.endswith(".jpg")]
    assert len({files[name] for name in pictures}) == len({Path(name).name for name in pictures}) == 132


def test_set_has_the_variety_it_promises(coco: COCO) -> None:
    objects = [entry for entry in coco.anns.values() if not entry["iscrowd"]]
    per_image = [len(coco.imgToAnns[image_id]) for image_id in coco.imgs]
    assert min(per_image) == 0
    assert 5 <= max(per_image) <= 7
    assert 2.0 < np.mean(per_image) < 3.0
    counts = {name: sum(e["category_id"] == i for e in objects) for i, name in SHAPE_CATEGORIES.items()}
    assert min(counts.values()) > 0.5 * max(counts.values())
    areas = np.array([entry["area"] for entry in objects])
    # COCO's limits between small, medium and large.
    assert 0.1 < (areas < 32**2).mean() < 0.5
    # At most one in a hundred is larger than 96 x 96; two thirds of that side are common.
    assert (areas > 64**2).any()
    crowds = [entry for entry in coco.anns.values() if entry["iscrowd"]]
    assert 2 <= len(crowds) <= 20
    assert all(isinstance(entry["segmentation"], dict) for entry in crowds)
    kinds = {type(entry["segmentation"]) for entry in objects}
    assert kinds == {list, dict}


def test_boxes_and_areas_agree_with_the_masks(coco: COCO) -> None:
    for entry in coco.anns.values():
        mask = coco.annToMask(entry).astype(bool)
        x, y, width, height = entry["bbox"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # Masks have whole pixels, and the last two of a star's tip are less than half full and not in them.
        np.testing.assert_allclose(extent, [x, y, x + width, y + height], rtol=0, atol=2.5)
        assert x >= 0
        assert y >= 0
        assert max(x + width, y + height) <= SCENE_SIZE + 0.01
        # Half a pixel along the outline, at most about its length.
        assert abs(mask.sum() - entry["area"]) < 2 * (width + height) + 4


def test_disc_annotation_is_exact() -> None:
    # A disc alone in its picture: its area follows from its box as that of an ellipse whose axes are turned.
    checked = 0
    for seed in range(160):
        _, objects = render_scene(np.random.default_rng(seed))
        if len(objects) != 1 or objects[0]["category_id"] != 2 or not isinstance(objects[0]["segmentation"], list):
            continue
        checked += 1
        points = np.array(objects[0]["segmentation"][0]).reshape(-1, 2)
        x, y = points.T
        polygon_area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
        # The fine grid is a third of a pixel: a sixth along the outline at most, and no bias.
        assert objects[0]["area"] == pytest.approx(polygon_area, abs=math.sqrt(polygon_area))
        box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
        np.testing.assert_allclose(objects[0]["bbox"], box, rtol=0, atol=0.7)
    assert checked >= 2


def test_hidden_objects_stay_visible_enough(coco: COCO) -> None:
    # At least 55 % of 60 % of a bar 44 pixels long is left of any object.
    smallest = 0.55 * 0.6 * (44 * 0.85) * (44 * 0.3 * 0.85)
    assert min(entry["area"] for entry in coco.anns.values()) > smallest


def test_colour_is_a_hint_and_no_answer(root: Path, coco: COCO) -> None:
    # Three of four shapes wear their class's hue: guessing by the nearest usual hue is right for 3/4 + 1/4 * 1/6.
    names = list(SHAPE_CATEGORIES)
    hits = []
    for image_id, image in coco.imgs.items():
        pixels = np.asarray(Image.open(root / "train2017" / image["file_name"]).convert("HSV"), dtype=float)
        for entry in coco.imgToAnns[image_id]:
            if not entry["iscrowd"]:
                angle = pixels[coco.annToMask(entry) > 0][:, 0] / 256 * 2 * math.pi
                hue = np.angle(np.exp(1j * angle).mean()) / (2 * math.pi)
                hits.append(names[round(hue * len(names)) % len(names)] == entry["category_id"])
    # About 360 objects: three standard errors are 7 points; shapes in front spoil a few.
    assert 0.65 < np.mean(hits) < 0.87


def test_default_data_set_is_built_from_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.ensure_generated", lambda cache: ensure_generated(cache, num_train=120, num_val=12))
    args = options(cache_dir=str(root.parent), eval_scale=128)
    dataset = build_dataset("val", args)
    assert len(dataset) == 12
    assert dataset.num_classes == 18
    assert dataset.class_names[17] == "ring"
    assert dataset[0][0].shape == (3, 128, 128)


def test_second_call_writes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(generated, "_write_split", fail)
    assert ensure_generated(root.parent, num_train=120, num_val=12) == root


def test_interrupted_writing_leaves_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = generated._write_split

    def interrupted(root: Path, split: str, count: int) -> None:
        original(root, split, count)
        if split == "train":
            raise KeyboardInterrupt

    monkeypatch.setattr(generated, "_write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_generated(tmp_path, num_train=2, num_val=1)
    assert not any(path.is_dir() and not path.name.endswith(".unfinished") for path in tmp_path.iterdir())
    monkeypatch.undo()
    root = ensure_generated(tmp_path, num_train=2, num_val=1)
    assert len(list((root / "train2017").iterdir())) == 2
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [root]


def test_processes_at_the_same_time_write_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        roots = pool.map(_generate_and_stat, [tmp_path] * 3)
    assert len(set(roots)) == 1


def _generate_and_stat(cache: Path) -> tuple[str, int]:
    root = ensure_generated(cache, num_train=5, num_val=2)
    return str(root), (root / "annotations" / "instances_val2017.json").stat().st_ino


def test_unwritable_cache_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match="choose another folder with --cache_dir"):
        ensure_generated(tmp_path / "file" / "cache", num_train=1, num_val=1)
