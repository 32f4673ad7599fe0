"""Position encodings of feature maps: sine waves or learned tables.

From "End-to-End Object Detection with Transformers" (DETR); DAB-DETR, section "Width & Height-Modulated", lowers the
temperature, Deformable-DETR shifts the coordinates to pixel centres.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from util.errors import OptionError

TABLE_SIZE = 50


class SinePositionEncoding(nn.Module):
    """Encode where a pixel lies in the unpadded image by sines and cosines of its relative coordinates."""

    def __init__(
        self,
        num_feats: int,
        *,
        temperature_h: float = 20.0,
        temperature_w: float = 20.0,
        half_pixel_shift: bool = False,
    ) -> None:
        """Set the wavelengths.

        Args:
            num_feats: numbers per axis, even; sines and cosines alternate.
            temperature_h: ratio of the longest to the shortest wavelength, vertical axis.
            temperature_w: the same, horizontal axis.
            half_pixel_shift: measure to the centre of a pixel, not to its far edge.

        Raises:
            OptionError: ``num_feats`` is odd or not positive.
        """
        super().__init__()
        if num_feats < 2 or num_feats % 2:
            raise OptionError(
                f"expected an even number of position features per axis, got {num_feats}: "
                "pass a --hidden_dim that is a multiple of 4"
            )
        self.num_feats = num_feats
        self.temperature_h = temperature_h
        self.temperature_w = temperature_w
        self.shift = 0.5 if half_pixel_shift else 0.0

    def forward(self, mask: Tensor, padded: bool = True) -> Tensor:
        """Return the encoding of every pixel.

        Args:
            mask: (B, h, w) bool, True = padding.
            padded: False where nothing in the mask is True.

        Returns:
            (B, 2 * num_feats, h, w) float32, vertical half first.
        """
        # Without padding all columns have the same vertical half, all rows the same horizontal one: one is enough.
        valid_y, valid_x = (~mask, ~mask) if padded else (~mask[:1, :, :1], ~mask[:1, :1])
        y = self._encode(valid_y.cumsum(1, dtype=torch.float32), 1, self.temperature_h)
        x = self._encode(valid_x.cumsum(2, dtype=torch.float32), 2, self.temperature_w)
        halves = [half.expand(*mask.shape, -1) for half in (y, x)]
        return torch.cat(halves, dim=-1).permute(0, 3, 1, 2)

    def _encode(self, count: Tensor, axis: int, temperature: float) -> Tensor:
        # The last count along the axis is the number of valid pixels; the constant keeps rows of padding finite.
        total = count.narrow(axis, count.shape[axis] - 1, 1)
        angle = (count - self.shift) / (total + 1e-6) * (2 * math.pi)
        exponent = torch.arange(0, self.num_feats, 2, dtype=torch.float32, device=count.device) / self.num_feats
        waves = angle[..., None] / temperature**exponent
        return torch.stack((waves.sin(), waves.cos()), dim=-1).flatten(-2)


class LearnedPositionEncoding(nn.Module):
    """Encode a pixel by a learned vector for its row and one for its column, whatever the padding."""

    def __init__(self, num_feats: int) -> None:
        """Fill both tables of 50 vectors of ``num_feats`` numbers uniformly from [0, 1)."""
        super().__init__()
        self.row_embed = nn.Embedding(TABLE_SIZE, num_feats)
        self.col_embed = nn.Embedding(TABLE_SIZE, num_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor, padded: bool = True) -> Tensor:
        """Return the encoding of every pixel.

        Args:
            mask: (B, h, w) bool; only its shape counts.
            padded: makes no difference here.

        Returns:
            (B, 2 * num_feats, h, w) float32, horizontal half first.

        Raises:
            ValueError: the map has more rows or columns than the tables.
        """
        batch, height, width = mask.shape
        if height > TABLE_SIZE or width > TABLE_SIZE:
            raise ValueError(
                f"learned position encodings know {TABLE_SIZE} rows and columns, got a feature map of {height} x "
                f"{width}: use --position_embedding sine, smaller images, or no --dilation"
            )
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        encoding = torch.cat((columns, rows), dim=-1).permute(2, 0, 1)
        return encoding.expand(batch, -1, -1, -1)


def build_position_encoding(
    kind: str,
    hidden_dim: int,
    *,
    temperature_h: float = 20.0,
    temperature_w: float = 20.0,
    half_pixel_shift: bool = False,
) -> nn.Module:
    """Build the encoding whose two halves together are as wide as the transformer.

    Args:
        kind: "sine" or "learned".
        hidden_dim: width of the transformer.
        temperature_h, temperature_w, half_pixel_shift: of the sine encoding; the learned one has no use for them.

    Raises:
        OptionError: the kind is unknown, or ``hidden_dim`` cannot be divided evenly.
    """
    if hidden_dim % 2:
        raise OptionError(f"expected an even --hidden_dim, got {hidden_dim}: the two axes share it equally")
    if kind == "sine":
        return SinePositionEncoding(
            hidden_dim // 2,
            temperature_h=temperature_h,
            temperature_w=temperature_w,
            half_pixel_shift=half_pixel_shift,
        )
    if kind == "learned":
        return LearnedPositionEncoding(hidden_dim // 2)
    raise OptionError(f"expected --position_embedding sine or learned, got '{kind}'")
