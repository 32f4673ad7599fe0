"""The attention module: official numbers, names and initial values."""

from __future__ import annotations

import math

import pytest
import torch

from models.layers import ms_deform_attn as module
from models.layers.ms_deform_attn import MSDeformAttn
from tests.golden_recipe import load_recipe_weights
from tests.ms_deform_attn_cases import ARRAYS, META

MODULES = sorted(META["modules"])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", MODULES)
def test_module_equals_reference_numbers(case: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FUSED_FROM", 0 if fused else math.inf)
    sizes = META["modules"][case]
    layer = MSDeformAttn(sizes["d_model"], sizes["n_levels"], sizes["n_heads"], sizes["n_points"])
    load_recipe_weights(layer, prefix=sizes["weight_name_prefix"])
    names = ("query", "reference_points", "input_flatten", "input_padding_mask", "grad_output")
    query, points, tokens, mask, grad = (torch.from_numpy(ARRAYS[f"module/{case}/in/{name}"]) for name in names)
    for leaf in (query, points, tokens):
        leaf.requires_grad_()
    shapes = sizes["spatial_shapes"]
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    output = layer(query, points, tokens, shapes, starts, mask)
    output.backward(grad)
    actual = {"output": output, "grad_query": query.grad, "grad_reference_points": points.grad}
    actual["grad_input_flatten"] = tokens.grad
    actual |= {f"grad_param/{name}": p.grad for name, p in layer.named_parameters()}
    for name, value in actual.items():
        expected = torch.from_numpy(ARRAYS[f"module/{case}/{name}"])
        # Two float32 computations; a location's gradient sums over channels and multiplies by the level size.
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5, msg=name)


def test_state_dict_has_the_official_names_and_order() -> None:
    shapes = {name: tuple(t.shape) for name, t in MSDeformAttn().state_dict().items()}
    linears = {"sampling_offsets": 256, "attention_weights": 128, "value_proj": 256, "output_proj": 256}
    expected = {
        f"{n}.{k}": ((c, 256) if k == "weight" else (c,)) for n, c in linears.items() for k in ("weight", "bias")
    }
    assert list(shapes.items()) == list(expected.items())


def test_initial_offsets_look_around() -> None:
    layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=8, n_points=3)
    offsets = layer.sampling_offsets.bias.view(8, 2, 3, 2)
    d = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor([[[(x * (p + 1), y * (p + 1)) for p in range(3)]] * 2 for x, y in d], dtype=torch.float32)
    # float32 angles up to 5.5 are known to 5e-7, and the third point triples that.
    torch.testing.assert_close(offsets, expected, atol=1e-5, rtol=0)
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.weight.any()
    assert not layer.attention_weights.bias.any() and not layer.value_proj.bias.any()


def test_padding_counts_as_zero() -> None:
    layer = MSDeformAttn(d_model=8, n_levels=1, n_heads=2, n_points=2)
    tokens, query, points = torch.randn(1, 6, 8), torch.randn(1, 3, 8), torch.rand(1, 3, 1, 2)
    mask = torch.tensor([[False, False, True, False, True, True]])
    output = layer(query, points, tokens, [(2, 3)], [0], mask)
    changed = torch.where(mask[..., None], 100.0, tokens)
    assert torch.equal(output, layer(query, points, changed, [(2, 3)], [0], mask))
    assert not torch.equal(output, layer(query, points, tokens, [(2, 3)], [0]))


def test_sizes_may_be_tensors() -> None:
    layer = MSDeformAttn(d_model=8, n_levels=2, n_heads=2, n_points=2)
    tokens, query, points = torch.randn(2, 7, 8), torch.randn(2, 3, 8), torch.rand(2, 3, 2, 2)
    expected = layer(query, points, tokens, [(2, 3), (1, 1)], [0, 6])
    actual = layer(query, points, tokens, torch.tensor([(2, 3), (1, 1)]), torch.tensor([0, 6]))
    assert torch.equal(actual, expected)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by n_heads"):
        MSDeformAttn(d_model=30, n_heads=8)
    layer = MSDeformAttn(d_model=8, n_levels=1, n_heads=2, n_points=2)
    with pytest.raises(ValueError, match="2 or 4 coordinates"):
        layer(torch.zeros(1, 3, 8), torch.zeros(1, 3, 1, 3), torch.zeros(1, 6, 8), [(2, 3)], [0])
