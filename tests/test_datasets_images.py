"""Pictures of every kind become 8-bit RGB; bad ones become a sentence."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.annotations import DatasetError
from datasets.images import ImageFolder, decode_image


def encode(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(channels: int | None = 3, top: int = 256, dtype: type = np.uint8) -> np.ndarray:
    shape = (12, 17) if channels is None else (12, 17, channels)
    return np.random.RandomState(0).randint(0, top, size=shape).astype(dtype)


def test_rgb_passes_unchanged() -> None:
    pixels = noise()
    decoded = decode_image(encode(Image.fromarray(pixels)))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), pixels)


def test_gray_is_repeated_over_the_channels() -> None:
    pixels = noise(None)
    decoded = np.asarray(decode_image(encode(Image.fromarray(pixels))))
    assert np.array_equal(decoded, np.repeat(pixels[..., None], 3, axis=2))


def test_black_and_white_becomes_0_and_255() -> None:
    pixels = noise(None) > 128
    decoded = np.asarray(decode_image(encode(Image.fromarray(pixels))))
    assert np.array_equal(decoded[..., 1], np.where(pixels, 255, 0))


def test_alpha_is_dropped() -> None:
    pixels = noise(4)
    assert np.array_equal(np.asarray(decode_image(encode(Image.fromarray(pixels)))), pixels[..., :3])


def test_palette_is_looked_up() -> None:
    palette = Image.fromarray(noise()).quantize(16)
    decoded = np.asarray(decode_image(encode(palette)))
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    assert np.array_equal(decoded, colours[np.asarray(palette)])


def test_cmyk_jpeg_becomes_rgb() -> None:
    # Full cyan, no black: red must be near 0, green and blue near 255 (JPEG and Pillow's plain formula: within 8).
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = np.asarray(decode_image(encode(image, "JPEG", quality=95)))[8, 8].tolist()
    assert red < 8
    assert min(green, blue) > 247


def test_16_bit_gray_keeps_the_high_byte() -> None:
    values = noise(None, top=65536, dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = np.asarray(decode_image(encode(Image.fromarray(values), kind)))
        assert np.array_equal(decoded[..., 0], values >> 8)
        assert np.array_equal(decoded[..., 2], values >> 8)


def test_unknown_ranges_are_refused() -> None:
    with pytest.raises(DatasetError, match="floating-point"):
        decode_image(encode(Image.fromarray(noise(None).astype(np.float32)), "TIFF"))
    with pytest.raises(DatasetError, match="do not fit 16 bits"):
        decode_image(encode(Image.fromarray(noise(None).astype(np.int32) + 100_000), "TIFF"))


def test_exif_rotation_is_ignored() -> None:
    # A wide picture whose EXIF entry asks for a quarter turn stays wide: boxes refer to the pixels as stored.
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(Image.fromarray(noise()), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(encoded)).getexif()[0x0112] == 6
    assert decode_image(encoded).size == (17, 12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_truncated_picture_is_refused(kind: str) -> None:
    encoded = encode(Image.fromarray(noise()), kind)
    for length in (0, 5, len(encoded) // 2):
        with pytest.raises(DatasetError, match="not a readable picture"):
            decode_image(encoded[:length])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on some of the damage
def test_overwritten_picture_raises_nothing_but_dataset_error() -> None:
    rs = np.random.RandomState(1)
    refused = 0
    for kind in ("PNG", "JPEG", "TIFF", "GIF"):
        encoded = encode(Image.fromarray(noise()), kind)
        for _ in range(60):
            damaged = bytearray(encoded)
            for position in rs.randint(0, len(damaged), size=8):
                damaged[position] = rs.randint(256)
            try:
                decode_image(bytes(damaged))
            except DatasetError:
                refused += 1
    # Damage inside the pixels may go unseen; damage to structure must not, and no other exception may escape.
    assert refused > 40


def folder_with(tmp_path: Path, *, keep_bytes: bool = False, allow_missing: bool = False) -> ImageFolder:
    return ImageFolder(tmp_path, ["a.png", "sub/b.png"], [11, 12], keep_bytes=keep_bytes, allow_missing=allow_missing)


def test_folder_names_path_and_id_of_a_bad_picture(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "sub" / "b.png").write_bytes(b"not a picture")
    folder = folder_with(tmp_path)
    assert folder.read(0).size == (17, 12)
    with pytest.raises(DatasetError, match=r"sub/b\.png \(image id 12\): not a readable picture"):
        folder.read(1)


def test_folder_refuses_missing_pictures_at_once(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"1 of 2 pictures are missing .* sub/b\.png \(image id 12\)"):
        folder_with(tmp_path)
    folder = folder_with(tmp_path, allow_missing=True)
    with pytest.raises(DatasetError, match=r"image id 12.*cannot read the file"):
        folder.read(1)


def test_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no image folder"):
        folder_with(tmp_path / "absent")


def test_kept_bytes_survive_the_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.fromarray(noise()).save(tmp_path / name)
    kept, read = folder_with(tmp_path, keep_bytes=True), folder_with(tmp_path)
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).unlink()
    assert np.array_equal(np.asarray(kept.read(1)), noise())
    with pytest.raises(DatasetError, match="cannot read the file"):
        read.read(1)
