"""The sizes that every layer of a transformer is built with."""

from __future__ import annotations

from typing import NamedTuple


class LayerSizes(NamedTuple):
    """What all layers of a transformer, encoder and decoder, have in common.

    Attributes:
        d_model: C; num_heads: H, a divisor of C.
        dim_feedforward: hidden channels of feed-forward blocks.
        dropout: rate, of attention weights, of hidden layers and of what is added to a token.
        activation: of feed-forward blocks, one of `models.layers.feed_forward.ACTIVATIONS`.
    """

    d_model: int
    num_heads: int
    dim_feedforward: int
    dropout: float
    activation: str
