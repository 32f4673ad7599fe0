"""Multi-level projection: names, initial values, derived levels, masks and encodings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.feature_projection import FeatureProjection, resize_mask
from models.layers.position_encoding import SinePositionEncoding
from tests.golden_recipe import load_json
from util.errors import OptionError
from util.nested_tensor import NestedTensor

SIZES = ((12, 16), (6, 8), (3, 4))


def batch_mask() -> Tensor:
    mask = torch.ones(2, 96, 128, dtype=torch.bool)
    mask[0] = False
    mask[1, :64, :88] = False
    return mask


def features_of(channels: list[int], mask: Tensor) -> list[NestedTensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES[-len(channels) :]
    maps = [torch.randn(2, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]
    return [NestedTensor(each, resize_mask(mask, each.shape[-2:])) for each in maps]


@pytest.mark.parametrize("stored", ["dn_dab_deformable_detr_r50", "deformable_detr_r50_single_scale"])
def test_projection_has_official_names_and_shapes(stored: str) -> None:
    entries = load_json(f"state_dict/{stored}.json")["state_dict"]
    expected = [(name, shape) for name, shape, _ in entries if name.startswith("input_proj.")]
    channels = [512, 1024, 2048] if len(expected) == 16 else [2048]
    detector = nn.Module()
    detector.input_proj = FeatureProjection(channels, 256, len(expected) // 4)
    assert [(name, list(value.shape)) for name, value in detector.state_dict().items()] == expected


def test_projection_starts_xavier_with_zero_bias() -> None:
    torch.manual_seed(0)
    projection = FeatureProjection([64], 32, 2)
    for index, fan in enumerate((64 + 32, (64 + 32) * 9)):
        conv = projection.get_submodule(f"{index}.0")
        bound = (6 / fan) ** 0.5
        # At least 2,048 uniform numbers: the largest lies within 1 % of the bound.
        assert conv.get_parameter("weight").abs().max().item() == pytest.approx(bound, rel=0.01)
        assert not conv.get_parameter("bias").any()


@pytest.mark.parametrize(
    ("channels", "num_levels"), [([64], 1), ([32, 64], 2), ([16, 32, 64], 3), ([16, 32, 64], 4), ([16, 32, 64], 5)]
)
def test_projection_gives_every_level(channels: list[int], num_levels: int) -> None:
    torch.manual_seed(0)
    encode = SinePositionEncoding(16)
    mask = batch_mask()
    features = features_of(channels, mask)
    positions = [encode(feature.mask) for feature in features]
    projection = FeatureProjection(channels, 32, num_levels)
    levels = projection(features, positions, mask, encode)
    expected_sizes = [*SIZES[-len(channels) :], (2, 2), (1, 1)][:num_levels]
    assert [tuple(source.shape) for source in levels.sources] == [(2, 32, *size) for size in expected_sizes]
    for size, level_mask, position in zip(expected_sizes, levels.masks, levels.positions, strict=True):
        # Independent nearest rule: pixel i of n reads pixel floor(i * N / n).
        rows = torch.arange(size[0]) * 96 // size[0]
        columns = torch.arange(size[1]) * 128 // size[1]
        assert torch.equal(level_mask, mask[:, rows][:, :, columns])
        assert torch.equal(position, encode(level_mask))


def test_projection_derives_levels_from_raw_last_map() -> None:
    torch.manual_seed(0)
    mask = batch_mask()
    features = [NestedTensor(each.tensors.double(), each.mask) for each in features_of([16, 64], mask)]
    projection = FeatureProjection([16, 64], 64, 4).double()
    sources = projection(features, [mask.new_zeros(1).float()] * 2, mask, SinePositionEncoding(32)).sources

    def norm(x: Tensor) -> Tensor:
        groups = x.reshape(2, 32, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        return groups.reshape(x.shape)

    def conv(index: int, x: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, projection.get_parameter(f"{index}.0.weight"), stride=stride, padding=padding)

    third = norm(conv(2, features[-1].tensors, 2, 1))
    expected = [
        norm(conv(0, features[0].tensors, 1, 0)),
        norm(conv(1, features[1].tensors, 1, 0)),
        third,
        norm(conv(3, third, 2, 1)),
    ]
    for actual, wanted in zip(sources, expected, strict=True):
        # float64: the last map has one pixel, and a norm over two numbers magnifies the rounding of their difference.
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_projection_trains_every_parameter() -> None:
    torch.manual_seed(0)
    mask = batch_mask()
    features = features_of([16, 64], mask)
    projection = FeatureProjection([16, 64], 64, 4)
    levels = projection(features, [torch.zeros(1)] * 2, mask, SinePositionEncoding(32))
    sum(source.square().sum() for source in levels.sources).backward()
    for name, parameter in projection.named_parameters():
        assert parameter.grad is not None and (parameter.grad.abs().max() > 0 or name.endswith("0.bias")), name


def test_projection_refuses_what_it_cannot_build() -> None:
    with pytest.raises(OptionError, match="at least one feature level per backbone map"):
        FeatureProjection([16, 32, 64], 32, 2)
    with pytest.raises(OptionError, match="multiple of 32, got 48"):
        FeatureProjection([16], 48, 1)
    mask = batch_mask()
    with pytest.raises(ValueError, match="expected 1 backbone maps, got 2"):
        FeatureProjection([64], 32, 2)(features_of([16, 64], mask), [], mask, SinePositionEncoding(16))
