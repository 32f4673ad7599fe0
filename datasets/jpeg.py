"""The frame header of a JPEG: what has to be known before a decoder is chosen, without the work of opening the file."""

from __future__ import annotations

from typing import NamedTuple

_START_OF_IMAGE = b"\xff\xd8"
_START_OF_SCAN = 0xDA
# Baseline, extended and progressive, all coded by Huffman: what every decoder reads.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
# Tables, restart interval, APP0 to APP15 and comments.
_NOTES = frozenset({0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})


class Frame(NamedTuple):
    """What a frame header says.

    Attributes:
        bits: per value.
        height, width: in pixels; a height of 0 is told after the pixels.
        components: 1 gray, 3 colour, 4 CMYK.
    """

    bits: int
    height: int
    width: int
    components: int


def read_frame(encoded: bytes) -> Frame | None:
    """Find the frame header of a JPEG file; None for another kind of file, an unusual or a damaged one.

    All segments before the pixels are walked over. Thumbnails are JPEGs too, inside such a segment.
    """
    if not encoded.startswith(_START_OF_IMAGE):
        return None
    frame, position = None, len(_START_OF_IMAGE)
    while encoded[position : position + 1] == b"\xff" and position + 4 <= len(encoded):
        marker, length = encoded[position + 1], _number(encoded[position + 2 : position + 4])
        if marker == 0xFF:  # any number of them may stand before a marker
            position += 1
            continue
        if marker == _START_OF_SCAN:
            return frame
        if marker in _FRAMES and frame is None:
            frame = _parse(encoded[position + 4 : position + 2 + length])
        elif marker not in _NOTES or length < 2:
            return None
        position += 2 + length
    return None


def _parse(segment: bytes) -> Frame | None:
    if len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
        return None
    return Frame(segment[0], _number(segment[1:3]), _number(segment[3:5]), segment[5])


def _number(two_bytes: bytes) -> int:
    return int.from_bytes(two_bytes, "big")
