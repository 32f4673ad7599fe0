"""Attention, anchor encoding and activations against recorded official numbers and torch's own modules."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from models.layers.anchor_encoding import anchor_sine_embedding
from models.layers.attention import ProjectedAttention, SelfAttention, attend, visible_keys, visible_queries
from models.layers.feed_forward import ACTIVATIONS, activated_width, build_activation
from models.layers.mlp import MLP
from tests.golden_recipe import load_npz, weight

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def golden():
    return load_npz("functions.npz")


def test_projected_attention_equals_official(golden):
    # 16 query and key channels, 8 value channels, 4 heads, float mask and padding at once.
    query, key, value = (torch.from_numpy(golden[f"mha/{n}"]).transpose(0, 1) for n in ("query", "key", "value"))
    attention = ProjectedAttention(8, 4)
    names = json.loads(str(golden["mha/param_names"]))
    state = {name: torch.from_numpy(weight(f"mha.{name}", tuple(shape), "fn:")) for name, shape in names}
    attention.load_state_dict(state)
    padding = visible_keys(torch.from_numpy(golden["mha/key_padding_mask"]))
    allowed = visible_queries(torch.from_numpy(golden["mha/attn_mask"]))
    out = attention(query, key, value, padding & allowed)
    torch.testing.assert_close(out, torch.from_numpy(golden["mha/out"]).transpose(0, 1), **CLOSE)


def test_self_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes
    tokens, position = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    placed = tokens + position
    expected, _ = theirs(placed, placed, tokens, key_padding_mask=padding)
    torch.testing.assert_close(ours(tokens, position, visible_keys(padding)), expected, **CLOSE)


def test_attend_takes_a_mask_for_each_image():
    query = torch.randn(2, 3, 8)
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[1, :, 2] = True
    both = attend(query, query, query, num_heads=2, may_attend=visible_queries(mask))
    alone = attend(query[1:], query[1:, :2], query[1:, :2], num_heads=2)
    torch.testing.assert_close(both[1:], alone, **CLOSE)
    assert visible_keys(None) is None and visible_queries(None) is None


def test_self_attention_refuses_a_width_the_heads_do_not_divide():
    with pytest.raises(ValueError, match="multiple of nheads"):
        SelfAttention(10, 4)


@pytest.mark.parametrize(("name", "coordinates"), [("4d", 4), ("2d", 2)])
def test_anchor_sine_embedding_equals_official(golden, name, coordinates):
    anchors = torch.from_numpy(golden["sine/in"])[..., :coordinates]
    # sin and cos of arguments up to 2 pi: the angle's rounding shows in the last digits.
    torch.testing.assert_close(
        anchor_sine_embedding(anchors), torch.from_numpy(golden[f"sine/{name}"]), rtol=1e-5, atol=2e-6
    )


def test_anchor_sine_embedding_computes_in_float32_for_half_precision():
    assert anchor_sine_embedding(torch.rand(2, 4).half(), 8).dtype == torch.float32


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_fits_a_feed_forward_block(name):
    hidden = build_activation(name)(torch.randn(2, 12))
    assert hidden.shape == (2, activated_width(name, 12))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'swish' is unknown: expected one of relu"):
        build_activation("swish")


def test_mlp_has_relu_between_layers_and_none_at_the_end():
    mlp = MLP(3, 5, 2, 3)
    x = torch.randn(4, 3)
    hidden = mlp.layers[1](mlp.layers[0](x).relu()).relu()
    torch.testing.assert_close(mlp(x), mlp.layers[2](hidden))


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 0, 3), (0, 3), (2, 2, 4, 3)])
def test_mlp_takes_any_leading_shape(shape):
    mlp, x = MLP(3, 5, 2, 3), torch.randn(shape)
    expected = mlp.layers[2](mlp.layers[1](mlp.layers[0](x).relu()).relu())
    assert expected.shape == (*shape[:-1], 2)
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp(x.expand(2, *shape).movedim(0, -2)), torch.stack((expected, expected), -2))
