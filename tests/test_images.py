"""Untrusted pictures: each is read upright, or refused with one clear sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nested_attention.errors import NestedAttentionError
from nested_attention.images import padded_square, read_image


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def half_red(width: int = 64, height: int = 32) -> Image.Image:
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[:, : width // 2] = (255, 0, 0)
    return Image.fromarray(pixels)


def bomb() -> bytes:
    """A small PNG that claims 100 000 x 100 000 pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


BAD = {
    "not a picture": (b"hello, I am a text", "not a picture"),
    "empty": (b"", "empty"),
    "cut off": (encoded(half_red(512, 512), "JPEG")[:900], "damaged|not a picture"),
    "50 megapixels": (encoded(Image.new("1", (7100, 7100))), "50 megapixels"),
    "bomb": (bomb(), "too many pixels"),
    "1 x 1": (encoded(Image.new("RGB", (1, 1))), "1 x 1"),
    "strip": (encoded(Image.new("1", (10_000, 20))), "strip"),
    "10000 x 10": (encoded(Image.new("1", (10_000, 10))), "10000 x 10"),
    "missing file": ("/nowhere/ada.png", "no file"),
    "wrong array": (np.zeros((4, 4, 7), np.uint8), "array of uint8"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_said_in_one_sentence(name: str) -> None:
    source, words = BAD[name]
    with pytest.raises(NestedAttentionError, match=words) as caught:
        read_image(source, "ada.png" if isinstance(source, bytes) else "the picture")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def rotated() -> bytes:
    """Stored lying on its side, with the EXIF note to turn it by 270 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(half_red().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


ODD = {
    "cmyk": lambda: encoded(half_red().convert("CMYK"), "JPEG"),
    "16 bit": lambda: encoded(Image.fromarray(np.asarray(half_red().convert("L"), np.uint16) * 257)),
    "floats up to 1": lambda: encoded(Image.fromarray(np.asarray(half_red().convert("L"), np.float32) / 255), "TIFF"),
    "floats up to 255": lambda: encoded(half_red().convert("F"), "TIFF"),
    "alpha": lambda: encoded(half_red().convert("RGBA")),
    "grey and alpha": lambda: encoded(half_red().convert("LA")),
    "palette with transparency": lambda: encoded(half_red().quantize(4), "GIF", transparency=3),
    "animated": lambda: encoded(half_red(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 32))]),
    "turned by EXIF": rotated,
    "webp": lambda: encoded(half_red(), "WEBP"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_come_out_upright_and_rgb(name: str) -> None:
    image = read_image(ODD[name]())
    assert image.mode == "RGB" and image.size == (64, 32)
    left, right = np.asarray(image)[16, 8], np.asarray(image)[16, 56]
    assert right.min() > 200 and left.mean() < right.mean() - 40


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert np.asarray(read_image(clear)).min() == 255


def test_padding_keeps_everything_and_crops_nothing() -> None:
    square = padded_square(half_red(64, 32), 64)
    pixels = np.asarray(square)
    assert square.size == (64, 64)
    assert tuple(pixels[32, 2]) == (255, 0, 0) and tuple(pixels[32, 61]) == (255, 255, 255)
    assert len({tuple(pixels[row, 5]) for row in (0, 3, 60, 63)}) == 1
