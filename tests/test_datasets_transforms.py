"""Transforms against the official numbers and against an independent pipeline of torchvision calls."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image

from datasets.annotations import DatasetError, Target
from datasets.transforms import (
    CROP_RANGE,
    MAX_SIZE,
    RESIZE_BEFORE_CROP,
    TRAIN_SCALES,
    EvalTransform,
    TrainTransform,
    crop,
    hflip,
    resize,
    resized_hw,
    to_model_input,
)
from tests.golden_recipe import load_json, rs_for
from util.pixels import IMAGE_MEAN, IMAGE_STD


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return load_json("transforms.json")


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, size=(height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def as_target(values: dict[str, Any]) -> Target:
    integers = ("labels", "orig_size", "size", "iscrowd")
    target = {k: torch.tensor(v, dtype=torch.int64 if k in integers else torch.float32) for k, v in values.items()}
    return target | {"boxes": target["boxes"].reshape(-1, 4)}


def three_boxes(width: int, height: int) -> Target:
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0], [0.45, 0.4, 0.55, 0.9]])
    boxes = boxes * torch.tensor([width, height, width, height])
    return {
        "boxes": boxes,
        "labels": torch.tensor([3, 1, 2]),
        "area": torch.tensor([10.0, 20.0, 30.0]),
        "iscrowd": torch.zeros(3, dtype=torch.int64),
        "image_id": torch.tensor([5]),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }


def test_defaults_are_official(golden: dict[str, Any]) -> None:
    parameters = golden["parameters"]
    assert list(TRAIN_SCALES) == parameters["scales"]
    assert parameters["max_size"] == MAX_SIZE
    assert list(RESIZE_BEFORE_CROP) == parameters["crop_branch_scales"]
    assert list(CROP_RANGE) == [parameters["crop_min"], parameters["crop_max"]]
    assert list(IMAGE_MEAN) == parameters["mean"]
    assert list(IMAGE_STD) == parameters["std"]


def test_resized_hw_matches_official_tables(golden: dict[str, Any]) -> None:
    for row in golden["resize"]:
        assert list(resized_hw(row["w"], row["h"], row["size"], row["max_size"])) == row["resized_hw"], row
    for row in golden["eval_resize"]:
        assert list(resized_hw(row["w"], row["h"], 800, 1333)) == row["resized_hw"], row


def test_resized_hw_of_extreme_aspect_keeps_a_pixel() -> None:
    assert resized_hw(10000, 1, 800, 1333) == (1, 10000)
    assert resized_hw(10000, 2, 800, 1333) == (1, 5000)


def test_eval_transform_gives_official_sizes(golden: dict[str, Any]) -> None:
    for row in golden["eval_resize"][:3]:
        image, target = EvalTransform()(noise_picture(row["w"], row["h"]), three_boxes(row["w"], row["h"]))
        assert list(image.shape) == [3, *row["resized_hw"]]
        assert target["size"].tolist() == row["resized_hw"]
        assert target["orig_size"].tolist() == [row["h"], row["w"]]


def test_fix_size_gives_official_sizes(golden: dict[str, Any]) -> None:
    for row in golden["fix_size_train"][:3]:
        image, _ = TrainTransform(fix_size=True)(noise_picture(row["w"], row["h"]), three_boxes(row["w"], row["h"]))
        assert list(image.shape) == [3, *row["resized_hw"]]


def test_box_transforms_match_official(golden: dict[str, Any]) -> None:
    seen = set()
    for case in golden["box_transforms"]:
        image, target = noise_picture(*case["image_wh"]), as_target(case["input"])
        seen.add(case["op"])
        if case["op"] == "hflip":
            _, result = hflip(image, target)
        elif case["op"] == "crop":
            _, result = crop(image, target, tuple(case["region_top_left_height_width"]))
        elif case["op"] == "resize":
            size_hw = resized_hw(*image.size, case["size"], case["max_size"])
            _, result = resize(image, target, size_hw)
        else:
            constant = Image.new("RGB", tuple(case["image_wh"]), tuple(case["constant_rgb"]))
            tensor, result = to_model_input(constant, target)
            assert list(tensor.shape) == [3, *case["image_wh"][::-1]]
            assert torch.equal(tensor[:, 0, 0], torch.tensor(case["output_pixel"]))
        expected = as_target(case["output"])
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            # The numbers were printed in full: equal float32 arithmetic gives equal numbers.
            torch.testing.assert_close(result[name], value, rtol=0, atol=0, msg=f"{case['op']} {name}")
    assert seen == {"hflip", "crop", "resize", "to_tensor_then_normalize"}


def test_resize_pixels_match_official(golden: dict[str, Any]) -> None:
    recipe = golden["resize_pixels"]
    pixels = rs_for("transform:pixels", recipe.get("salt", "")).randint(0, 256, size=(30, 45, 3)).astype(np.uint8)
    for name, size, max_size in (("size20", 20, None), ("size50_max60", 50, 60)):
        image = Image.fromarray(pixels)
        resized, _ = resize(image, three_boxes(45, 30), resized_hw(45, 30, size, max_size))
        values, expected = np.asarray(resized), recipe[name]
        assert list(values.shape) == expected["shape"]
        assert values[0, :5].tolist() == expected["row0"]
        assert values[-1, -1].tolist() == expected["last"]
        assert int(values.astype(np.int64).sum()) == expected["sum"]


def test_to_model_input_equals_torchvision() -> None:
    image = noise_picture(7, 5)
    tensor, target = to_model_input(image, three_boxes(7, 5))
    assert torch.equal(tensor, F.normalize(F.to_tensor(image), list(IMAGE_MEAN), list(IMAGE_STD)))
    assert tensor.is_contiguous()
    torch.testing.assert_close(target["boxes"][1], torch.tensor([0.5, 0.5, 1.0, 1.0]), rtol=0, atol=0)


def official_pixels(image: Image.Image, fix_size: bool) -> torch.Tensor:
    """The random calls of the official pipeline in their order, on torchvision's functions."""

    def resized(image: Image.Image, size: int, max_size: int | None) -> Image.Image:
        return F.resize(image, list(resized_hw(*image.size, size, max_size)))

    if random.random() < 0.5:
        image = F.hflip(image)
    if fix_size:
        width, height = random.choice([(1333, 800)])
        image = F.resize(image, [height, width])
    elif random.random() < 0.5:
        image = resized(image, random.choice(TRAIN_SCALES), 1333)
    else:
        image = resized(image, random.choice(RESIZE_BEFORE_CROP), None)
        width = random.randint(384, min(image.width, 600))
        height = random.randint(384, min(image.height, 600))
        image = F.crop(image, *T.RandomCrop.get_params(image, [height, width]))
        image = resized(image, random.choice(TRAIN_SCALES), 1333)
    return F.normalize(F.to_tensor(image), list(IMAGE_MEAN), list(IMAGE_STD))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fix_size", [False, True])
def test_train_transform_draws_the_official_random_numbers(seed: int, fix_size: bool) -> None:
    image = noise_picture(120, 90)
    random.seed(seed)
    torch.manual_seed(seed)
    expected = official_pixels(image, fix_size)
    state = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.manual_seed(seed)
    tensor, _ = TrainTransform(fix_size=fix_size)(image, three_boxes(120, 90))
    assert torch.equal(tensor, expected)
    # Not one number more or less was drawn.
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_both_branches_occur_among_the_seeds() -> None:
    branches = set()
    for seed in range(6):
        random.seed(seed)
        branches.add((random.random() < 0.5, random.random() < 0.5))
    assert {branch for _, branch in branches} == {True, False}
    assert {flip for flip, _ in branches} == {True, False}


def test_train_transform_keeps_boxes_on_their_pixels() -> None:
    # One red square on black: wherever the augmentation puts it, its box must enclose the red pixels.
    image = Image.new("RGB", (60, 40))
    image.paste((255, 0, 0), (20, 10, 40, 30))
    transform = TrainTransform(scales=(80, 100), max_size=200, resize_before_crop=(70, 90), crop_range=(40, 60))
    checked = 0
    for seed in range(20):
        random.seed(seed)
        torch.manual_seed(seed)
        target = three_boxes(60, 40) | {"boxes": torch.tensor([[20.0, 10.0, 40.0, 30.0]] * 3)}
        tensor, result = transform(image, target)
        if not len(result["boxes"]):
            continue
        checked += 1
        red = (tensor[0] - tensor[1]) > 2.0
        rows, columns = red.any(1).nonzero(), red.any(0).nonzero()
        pixels = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        cx, cy, w, h = (result["boxes"][0] * torch.tensor([*tensor.shape[:0:-1]] * 2)).tolist()
        box = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        # Bilinear edges blur over about one source pixel, which is up to 2.5 pixels here.
        torch.testing.assert_close(pixels, box, rtol=0, atol=2.5)
    assert checked >= 15


def test_transforms_leave_their_input_alone() -> None:
    image, target = noise_picture(50, 40), three_boxes(50, 40)
    before = {name: value.clone() for name, value in target.items()}
    TrainTransform(scales=(30,), max_size=60, resize_before_crop=(40,), crop_range=(20, 30))(image, target)
    EvalTransform(scale=30)(image, target)
    assert all(torch.equal(target[name], value) for name, value in before.items())


def test_transforms_accept_no_boxes() -> None:
    target = {name: value[:0] if len(value) == 3 else value for name, value in three_boxes(50, 40).items()}
    for seed in range(4):
        random.seed(seed)
        _, result = TrainTransform(scales=(30,), max_size=60, resize_before_crop=(40,), crop_range=(20, 30))(
            noise_picture(50, 40), target
        )
        assert result["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scales": []},
        {"scales": [0]},
        {"max_size": 0},
        {"resize_before_crop": []},
        {"crop_range": [600, 384]},
        {"crop_range": [384]},
        {"crop_range": [384, 600], "resize_before_crop": [300]},
    ],
)
def test_train_transform_refuses_contradicting_sizes(wrong: dict[str, Any]) -> None:
    with pytest.raises(DatasetError):
        TrainTransform(**wrong)
