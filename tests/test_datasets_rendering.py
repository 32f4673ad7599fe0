"""Rendering with torch against Pillow: equal decisions and objects, nearly equal pixels, equal normalised batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import main as program
from datasets import TrainBatchSampler, build_data_loader, build_dataset
from datasets.annotations import DatasetError
from datasets.images import decode_image
from datasets.rendering import Augmentation, decode_pixels, render_picture, render_pixels, to_pixels
from datasets.transforms import TrainTransform
from tests.dataset_helpers import encoded, instances, options, shared_data, small_options, write_data_set, write_split
from tests.runs import command, write_pictures
from tools.training import build_run, evaluate_run, train_epoch
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.pixels import normalize_pixels
from util.step import to_device


def smooth_picture(width: int, height: int) -> Image.Image:
    """A picture without sharp edges, so that half a pixel of shift changes a value by a few levels only."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / 23 + k) * np.cos(y / 31 - k) for k in range(3)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_to_pillows_pixels(mode: str) -> None:
    content = encoded(smooth_picture(61, 45).convert(mode))
    expected = to_pixels(decode_image(content))
    assert torch.equal(decode_pixels(content), expected)
    assert decode_pixels(content).stride(0) == expected.stride(0) == 1


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 20}])
def test_kinds_of_jpeg_are_decoded_to_pillows_pixels(options: dict[str, object]) -> None:
    content = encoded(smooth_picture(61, 45), **options)
    assert torch.equal(decode_pixels(content), to_pixels(decode_image(content)))


def test_rotation_tags_are_ignored_by_both() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(smooth_picture(60, 40), exif=exif)
    assert decode_pixels(content).shape == (3, 40, 60)
    assert torch.equal(decode_pixels(content), to_pixels(decode_image(content)))


def test_other_formats_are_decoded_by_pillow() -> None:
    content = encoded(smooth_picture(20, 10).convert("P"), "PNG")
    assert torch.equal(decode_pixels(content), to_pixels(decode_image(content)))


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_files_are_refused_in_the_same_words(damage: str) -> None:
    whole = encoded(smooth_picture(61, 45))
    content = {"empty": b"", "text": b"no picture", "cut": whole[: len(whole) // 2]}[damage]
    with pytest.raises(DatasetError) as expected:
        decode_image(content)
    with pytest.raises(DatasetError) as found:
        decode_pixels(content)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size_hw", [(45, 61), (70, 95), (30, 41)])
def test_uncropped_pixels_differ_by_one_level_at_most(flip: bool, size_hw: tuple[int, int]) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (45, 61, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    plan = Augmentation(flip, None, None, size_hw)
    expected, found = render_picture(image, plan), render_pixels(to_pixels(image), plan)
    assert found.dtype == torch.uint8
    # Weights of 15 or 16 bits instead of Pillow's 22, then rounding.
    assert int((found.int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, ((50, 70), (3, 5, 40, 50))])
def test_rendered_pixels_lie_as_decoded(flip: bool, crop: Any) -> None:
    pixels = to_pixels(smooth_picture(61, 45))
    plan = Augmentation(flip, *(crop or (None, None)), (64, 80))
    rendered = render_pixels(pixels, plan)
    # The colours of a pixel side by side: so neither the resize nor the copy into the batch rearranges them.
    assert rendered.stride(0) == 1
    assert rendered.stride(2) == 3
    assert nested_tensor_from_tensor_list([rendered, pixels]).tensors.stride(1) == 1
    # The same values as resized in the order of planes.
    assert torch.equal(rendered, render_pixels(pixels.contiguous(), plan))


def test_cropped_pixels_are_close_on_a_smooth_picture() -> None:
    image, differences = smooth_picture(640, 480), []
    transform = TrainTransform()
    for seed in range(24):
        random.seed(seed)
        torch.manual_seed(seed)
        plan = transform.draw(image.width, image.height)
        expected, found = render_picture(image, plan), render_pixels(to_pixels(image), plan)
        assert found.shape == expected.shape == (3, *plan.size_hw)
        differences.append((found.int() - expected.int()).abs())
    # A slope of up to 120 / 23 levels per stored pixel, over less than a pixel, and one level of rounding twice.
    assert max(int(d.max()) for d in differences) <= 7
    assert max(float(d.float().mean()) for d in differences) < 1.5


def test_cropped_window_lies_within_a_pixel_of_where_it_should() -> None:
    worst = 0.0
    for seed in range(40):
        stored, before = random.Random(seed).choice([(480, 400), (427, 600), (640, 533), (375, 500)])
        start, wanted = random.Random(seed + 1).randrange(before - 384 + 1), 480 + 32 * (seed % 11)
        # Columns of a ramp tell their own position.
        ramp = torch.linspace(0, 255, stored).round().to(torch.uint8).expand(3, stored, stored)
        plan = Augmentation(False, (before, before), (start, start, 384, 384), (wanted, wanted))
        picture = Image.fromarray(ramp.permute(1, 2, 0).contiguous().numpy())
        expected, found = render_picture(picture, plan), render_pixels(ramp, plan)
        levels_per_pixel = 255 / (stored - 1) * stored / before * 384 / wanted
        middle = slice(10, -10)
        shift = (found[0, 0, middle].double() - expected[0, 0, middle].double()).mean() / levels_per_pixel
        worst = max(worst, abs(float(shift)))
    assert worst <= 1.0


@pytest.fixture(scope="module")
def jpeg_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jpegs")
    for split, first in (("train", 1), ("val", 101)):
        content = instances(6, first_id=first)
        for entry in content["images"]:
            entry["file_name"] = f"{entry['id']}.jpg"
        write_split(root, split, content, pictures=False)
        for entry in content["images"]:
            (root / f"{split}2017" / entry["file_name"]).write_bytes(encoded(smooth_picture(40, 30)))
    return root


def test_targets_do_not_depend_on_the_backend(jpeg_data: Path) -> None:
    datasets = [build_dataset("train", small_options(jpeg_data, image_backend=name)) for name in ("pil", "torch")]
    windows = set()
    for seed in range(12):
        samples, states = [], []
        for dataset in datasets:
            random.seed(seed)
            torch.manual_seed(seed)
            samples.append(dataset[seed % 6])
            states.append((random.getstate(), torch.get_rng_state()))
        (image, target), (fast_image, fast_target) = samples
        assert image.shape == fast_image.shape
        assert target.keys() == fast_target.keys()
        assert all(torch.equal(target[name], fast_target[name]) for name in target)
        assert states[0][0] == states[1][0]
        assert torch.equal(states[0][1], states[1][1])
        windows.add(len(target["labels"]))
    assert len(windows) > 1  # some crops lost objects


def test_real_pictures_are_nearly_equal() -> None:
    root = str(shared_data("coco_tiny"))
    pil, fast = (build_dataset("val", options(coco_path=root, image_backend=name)) for name in ("pil", "torch"))
    for index in range(3):
        (pixels, target), (fast_pixels, fast_target) = pil.load(index), fast.load(index)
        assert int((pixels.int() - fast_pixels.int()).abs().max()) <= 1
        assert all(torch.equal(target[name], fast_target[name]) for name in target)


@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_on_the_device_are_the_padded_normalised_samples(
    jpeg_data: Path, backend: str, num_workers: int
) -> None:
    dataset = build_dataset("val", small_options(jpeg_data, image_backend=backend))
    loader = build_data_loader(dataset, batch_sampler=TrainBatchSampler(6, batch_size=3), num_workers=num_workers)
    for samples, targets in loader:
        assert samples.tensors.dtype == torch.uint8
        moved, _ = to_device((samples, targets), torch.device("cpu"))
        images = [dataset[dataset.ids.index(int(target["image_id"]))][0] for target in targets]
        expected = nested_tensor_from_tensor_list(images)
        # The same numbers in the same memory order as if every sample had been normalised by its loading process.
        assert torch.equal(moved.tensors, expected.tensors)
        assert torch.equal(moved.mask, expected.mask)
        assert moved.tensors.is_contiguous() and moved.tensors.dtype == torch.float32


def test_padding_is_zero_after_normalisation() -> None:
    def pixels(height: int, width: int) -> Tensor:
        return torch.full((height, width, 3), 200, dtype=torch.uint8).permute(2, 0, 1)

    batch = nested_tensor_from_tensor_list([pixels(2, 5), pixels(4, 3)])
    assert batch.tensors.stride(1) == 1
    moved, _ = to_device((batch, ()), torch.device("cpu"))
    assert torch.equal(moved.tensors[0, :, :2], normalize_pixels(pixels(2, 5)))
    assert not moved.tensors[0, :, 2:].any()
    assert not moved.tensors[1, :, :, 3:].any()
    floats = NestedTensor(torch.rand(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    assert torch.equal(to_device((floats, ()), torch.device("cpu"))[0].tensors, floats.tensors)


def test_orientations_come_from_the_annotation_file(tmp_path: Path) -> None:
    content = instances(3)
    content["images"][1].update(width=30, height=40)
    content["images"][2].update(width=30, height=30)
    write_split(tmp_path, "val", instances(1, first_id=101))
    write_split(tmp_path, "train", content)
    assert build_dataset("train", small_options(tmp_path)).orientations() == [0, 1, 0]
    del content["images"][1]["width"]
    write_split(tmp_path, "train", content, pictures=False)
    with pytest.raises(DatasetError, match=r"2\.png \(image id 2\)"):
        build_dataset("train", small_options(tmp_path)).orientations()


def test_the_torch_backend_reads_cached_files(tmp_path: Path) -> None:
    root = write_data_set(tmp_path)
    args = small_options(root, image_backend="torch", cache_mode=True)
    dataset = build_dataset("val", args)
    expected = build_dataset("val", small_options(root, image_backend="torch"))[0][0]
    for file in (root / "val2017").iterdir():
        file.unlink()
    assert torch.equal(dataset[0][0], expected)


def test_a_run_honours_the_backend_and_the_grouping(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", num_train=4, num_val=2)
    options = ("--image_backend", "torch", "--aspect_ratio_grouping", "--batch_size", "2", "--epochs", "1")
    args = program.parse_args(command(data, tmp_path / "out", *options))
    run = build_run(args, torch.device("cpu"), None)
    assert run.train_sampler is not None and run.train_sampler.groups == [0] * 4
    assert run.train_data.image_backend == run.val_data.image_backend == "torch"
    train_epoch(run)
    assert len(evaluate_run(run, [])["coco_eval_bbox"]) == 12


def test_grouping_is_refused_where_batches_have_no_padding(capsys: pytest.CaptureFixture[str]) -> None:
    for why in (["--batch_size", "1"], ["--fix_size"]):
        with pytest.raises(SystemExit):
            program.parse_args(["-m", "dab_detr", "--aspect_ratio_grouping", *why])
        assert "has no effect with " + why[0] in capsys.readouterr().err
