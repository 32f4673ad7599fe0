"""Sine and learned position encodings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.layers.position_encoding import (
    LearnedPositionEncoding,
    SinePositionEncoding,
    build_position_encoding,
)
from tests.golden_recipe import load_npz, load_recipe_weights
from util.errors import OptionError

DEFORMABLE: dict[str, Any] = {"temperature_h": 10000.0, "temperature_w": 10000.0, "half_pixel_shift": True}


def mask_of(batch: int, height: int, width: int, valid_height: int, valid_width: int) -> Tensor:
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    mask[:, :valid_height, :valid_width] = False
    return mask


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        ("dab_h20_w20", {}),
        ("dab_h30_w10", {"temperature_h": 30.0, "temperature_w": 10.0}),
        ("deformable", DEFORMABLE),
        ("deformable_from_deformable_detr", DEFORMABLE),
    ],
)
def test_sine_equals_reference(stored: str, options: dict[str, Any]) -> None:
    arrays = load_npz("functions.npz")
    actual = SinePositionEncoding(8, **options)(torch.from_numpy(arrays["pos/mask"]))
    # Same order of float32 operations as the reference; sines of another maths library may differ in the last bits.
    # In rows and columns of padding alone the angle is about 3e6, where one float32 step is 0.25: left out.
    expected = torch.from_numpy(arrays[f"pos/{stored}"])
    for index, (rows, columns) in enumerate(((5, 7), (3, 4))):
        picked = (index, slice(None), slice(rows), slice(columns))
        torch.testing.assert_close(actual[picked], expected[picked], rtol=0, atol=1e-5)


def test_sine_equals_formula_per_pixel() -> None:
    mask = mask_of(1, 4, 6, 3, 5)
    actual = SinePositionEncoding(4, temperature_h=7.0, temperature_w=11.0, half_pixel_shift=True)(mask)
    for row in range(3):
        for column in range(5):
            expected = []
            for index, total, temperature in ((row, 3, 7.0), (column, 5, 11.0)):
                angle = (index + 0.5) / total * 2 * math.pi
                for pair in range(2):
                    wave = angle / temperature ** (2 * pair / 4)
                    expected += [math.sin(wave), math.cos(wave)]
            # float32 angles up to 2 pi and the 1e-6 in the denominator, about 2e-6 together.
            assert actual[0, :, row, column].tolist() == pytest.approx(expected, abs=5e-6)


def test_sine_ignores_how_much_padding_follows() -> None:
    encode = SinePositionEncoding(8)
    small = encode(mask_of(1, 3, 4, 3, 4))
    large = encode(mask_of(1, 6, 9, 3, 4))[:, :, :3, :4]
    assert torch.equal(small, large)


@pytest.mark.parametrize("kind", ["sine", "learned"])
def test_encoding_stays_float32_under_autocast(kind: str) -> None:
    encode = build_position_encoding(kind, 16)
    mask = mask_of(2, 5, 7, 4, 6)
    outside = encode(mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encode(mask)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert inside.shape == (2, 16, 5, 7)


def test_learned_equals_reference() -> None:
    arrays = load_npz("functions.npz")
    encode = LearnedPositionEncoding(8)
    load_recipe_weights(encode, "fn:")
    actual = encode(torch.from_numpy(arrays["pos/mask"]))
    # Table look-ups: no arithmetic, no tolerance.
    torch.testing.assert_close(actual, torch.from_numpy(arrays["pos/learned"]), rtol=0, atol=0)


def test_learned_has_official_names_and_uniform_start() -> None:
    torch.manual_seed(0)
    encode = LearnedPositionEncoding(128)
    shapes = {name: tuple(value.shape) for name, value in encode.state_dict().items()}
    assert list(shapes.items()) == [("row_embed.weight", (50, 128)), ("col_embed.weight", (50, 128))]
    # 6,400 uniform numbers: standard error of the mean 0.0036.
    assert encode.row_embed.weight.mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0 <= encode.col_embed.weight.min() < 0.01 < 0.99 < encode.col_embed.weight.max() < 1


def test_learned_gives_gradient_to_used_rows_only() -> None:
    encode = LearnedPositionEncoding(4)
    encode(mask_of(2, 3, 5, 3, 5)).sum().backward()
    assert encode.row_embed.weight.grad is not None and encode.col_embed.weight.grad is not None
    # Two images times five columns use each of three rows; two times three rows each of five columns.
    assert encode.row_embed.weight.grad.sum(1).tolist() == [40.0] * 3 + [0.0] * 47
    assert encode.col_embed.weight.grad.sum(1).tolist() == [24.0] * 5 + [0.0] * 45


def test_learned_refuses_larger_map() -> None:
    encode = LearnedPositionEncoding(4)
    assert encode(mask_of(1, 50, 50, 50, 50)).shape == (1, 8, 50, 50)
    with pytest.raises(ValueError, match=r"50 rows and columns.*51 x 3.*position_embedding sine"):
        encode(mask_of(1, 51, 3, 51, 3))


def test_build_sets_width_and_options() -> None:
    sine = build_position_encoding("sine", 64, temperature_h=30, temperature_w=10, half_pixel_shift=True)
    mask = mask_of(1, 3, 4, 3, 3)
    expected = SinePositionEncoding(32, temperature_h=30, temperature_w=10, half_pixel_shift=True)(mask)
    assert torch.equal(sine(mask), expected)
    assert not torch.equal(build_position_encoding("sine", 64)(mask), expected)
    learned = build_position_encoding("learned", 64)
    assert learned.get_parameter("row_embed.weight").shape == (50, 32)


@pytest.mark.parametrize(("kind", "hidden_dim"), [("v3", 64), ("sine", 63), ("sine", 66), ("learned", 33)])
def test_build_refuses_unknown_kind_and_uneven_width(kind: str, hidden_dim: int) -> None:
    with pytest.raises(OptionError, match="expected"):
        build_position_encoding(kind, hidden_dim)


@pytest.mark.parametrize("kind", ["sine", "learned"])
def test_encoding_without_padding_equals_that_of_an_empty_mask(kind):
    encode = build_position_encoding(kind, 16, half_pixel_shift=True)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    assert torch.equal(encode(mask, padded=False), encode(mask))
