"""The walk to a JPEG's frame header: sizes as Pillow reads them, nothing for what torchvision must not decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.annotations import DatasetError
from datasets.images import decode_image
from datasets.jpeg import Frame, read_frame
from datasets.rendering import decode_pixels, to_pixels
from tests.dataset_helpers import encoded


def noise_picture(width: int = 37, height: int = 21, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def with_thumbnail() -> bytes:
    """A picture whose APP1 segment holds another, smaller JPEG."""
    return encoded(noise_picture(), exif=b"Exif\0\0" + encoded(noise_picture(8, 6, seed=1)))


def before_marker(content: bytes, marker: int, inserted: bytes) -> bytes:
    """Insert bytes before the first marker of a kind."""
    place = content.index(bytes([0xFF, marker]))
    return content[:place] + inserted + content[place:]


def in_frame(content: bytes, offset: int, value: int) -> bytes:
    """Overwrite one byte of a baseline frame header, counted from its marker."""
    place = content.index(b"\xff\xc0") + offset
    return content[:place] + bytes([value]) + content[place + 1 :]


PLAIN = encoded(noise_picture())
SOUND = {
    "baseline": PLAIN,
    "progressive": encoded(noise_picture(), progressive=True),
    "restart markers": encoded(noise_picture(), restart_marker_blocks=1),
    "comment, profile, resolution": encoded(noise_picture(), comment=b"c", icc_profile=b"p" * 99, dpi=(72, 72)),
    "stored as RGB": encoded(noise_picture(), keep_rgb=True),
    "thumbnail": with_thumbnail(),
    "fill bytes": before_marker(before_marker(PLAIN, 0xC0, b"\xff" * 3), 0xDB, b"\xff"),
    "several pictures": encoded(noise_picture(), "MPO", save_all=True, append_images=[noise_picture(seed=2)]),
}


@pytest.mark.parametrize("kind", SOUND)
def test_frame_of_sound_files_is_found_and_decoded_to_pillows_pixels(kind: str) -> None:
    content = SOUND[kind]
    assert read_frame(content) == Frame(bits=8, height=21, width=37, components=3)
    assert torch.equal(decode_pixels(content), to_pixels(decode_image(content)))


@pytest.mark.parametrize(("mode", "components"), [("L", 1), ("CMYK", 4)])
def test_frame_tells_components(mode: str, components: int) -> None:
    content = encoded(noise_picture().convert(mode))
    assert read_frame(content) == Frame(bits=8, height=21, width=37, components=components)
    assert torch.equal(decode_pixels(content), to_pixels(decode_image(content)))


NO_FRAME = {
    "empty": b"",
    "another format": encoded(noise_picture(), "PNG"),
    "start alone": PLAIN[:2],
    "cut in a segment": PLAIN[:30],
    "cut after the frame": PLAIN[: PLAIN.index(b"\xff\xc0") + 19],
    "cut in the frame": PLAIN[: PLAIN.index(b"\xff\xc0") + 8],
    "arithmetic coding": PLAIN.replace(b"\xff\xc0", b"\xff\xc9"),
    "components and length differ": in_frame(PLAIN, 9, 4),
    "length of nothing": before_marker(PLAIN, 0xDB, b"\xff\xfe\x00\x00"),
    "no marker": before_marker(PLAIN, 0xDB, b"junk"),
    "two frames": PLAIN.replace(b"\xff\xda", PLAIN[PLAIN.index(b"\xff\xc0") :][:19] + b"\xff\xda", 1),
}


@pytest.mark.parametrize("kind", NO_FRAME)
def test_unusual_and_damaged_headers_are_left_to_pillow(kind: str) -> None:
    content = NO_FRAME[kind]
    assert read_frame(content) is None
    assert outcome_of_torch(content) == outcome_of_pillow(content)


@pytest.mark.parametrize("bits", [12, 16])
def test_other_depths_are_left_to_pillow(bits: int) -> None:
    content = in_frame(PLAIN, 4, bits)
    assert read_frame(content) == Frame(bits, 21, 37, 3)
    assert outcome_of_torch(content) == outcome_of_pillow(content)


def test_pictures_beyond_pillows_limit_are_refused_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 21 // 2 - 1)
    assert "exceeds limit" in str(outcome_of_pillow(PLAIN))
    assert outcome_of_torch(PLAIN) == outcome_of_pillow(PLAIN)


def test_damage_anywhere_in_the_header_has_the_outcome_of_pillow() -> None:
    end_of_header = PLAIN.index(b"\xff\xda") + 14
    random = np.random.RandomState(0)
    readable = 0
    for _ in range(300):
        place, value = int(random.randint(2, end_of_header)), int(random.choice([0, 255, random.randint(256)]))
        content = PLAIN[:place] + bytes([value]) + PLAIN[place + 1 :]
        outcome = outcome_of_torch(content)
        assert outcome == outcome_of_pillow(content), f"byte {place} made {value}"
        readable += not isinstance(outcome, str)
    assert 0 < readable < 300  # both outcomes occur


def outcome_of_torch(content: bytes) -> object:
    """Pixels as a list, or the sentence of the error."""
    try:
        return decode_pixels(content).tolist()
    except DatasetError as error:
        return str(error)


def outcome_of_pillow(content: bytes) -> object:
    """The same of the default backend."""
    try:
        return to_pixels(decode_image(content)).tolist()
    except DatasetError as error:
        return str(error)
