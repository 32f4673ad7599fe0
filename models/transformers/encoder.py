"""The dense encoder of DAB-DETR: self-attention over all tokens of one feature map."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..layers.attention import SelfAttention, visible_keys
from ..layers.feed_forward import activated_width, build_activation, feed_forward
from ..layers.mlp import MLP
from .layer_sizes import LayerSizes


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block, each followed by its norm (DETR, ECCV 2020, "Transformer")."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        d_model, dropout = sizes.d_model, sizes.dropout
        self.self_attn = SelfAttention(d_model, sizes.num_heads, dropout)
        self.linear1 = nn.Linear(d_model, sizes.dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(activated_width(sizes.activation, sizes.dim_feedforward), d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = build_activation(sizes.activation)

    def forward(self, tokens: Tensor, position: Tensor, may_attend: Tensor | None) -> Tensor:
        """Refine (B, S, C) tokens; `position` (B, S, C) enters queries and keys; `may_attend` as in `attend`."""
        tokens = self.norm1(tokens + self.dropout1(self.self_attn(tokens, position, may_attend)))
        hidden = feed_forward(tokens, self.linear1, self.activation, self.linear2, self.dropout)
        return self.norm2(tokens + self.dropout2(hidden))


class Encoder(nn.Module):
    """Encoder layers whose position encodings are scaled by the content (DAB-DETR, ICLR 2022, "Overview").

    One query scale is shared by all layers.
    """

    def __init__(self, layer: EncoderLayer, *, num_layers: int, d_model: int, final_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.query_scale = MLP(d_model, d_model, d_model, 2)
        # Kept for parity: --pre_norm adds this norm and leaves the layers post-norm.
        self.norm = nn.LayerNorm(d_model) if final_norm else None

    def forward(self, tokens: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Return memory (B, S, C) from tokens and position (B, S, C) and padding_mask (B, S), True = padding."""
        may_attend = visible_keys(padding_mask)
        for layer in self.layers:
            tokens = layer(tokens, position * self.query_scale(tokens), may_attend)
        return tokens if self.norm is None else self.norm(tokens)
