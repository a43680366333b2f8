"""Untrusted bytes, files or arrays -> one upright RGB picture, or one sentence that says why not."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nested_attention.errors import NestedAttentionError

ImageSource = bytes | str | Path | Image.Image | np.ndarray

MAX_MEGAPIXELS = 40.0
MIN_SIDE = 16
MAX_ASPECT = 8.0
WHITE = (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # nothing that runs another program, as EPS does


def read_image(source: ImageSource, name: str = "the picture") -> Image.Image:
    """An upright RGB picture.

    Transparency is laid on white, only the first frame of an animation counts, 16-bit and CMYK are converted, EXIF
    rotation is applied.

    Args:
        source: bytes, a path, a PIL picture or an array `(H, W)`, `(H, W, 3)` or `(H, W, 4)` of uint8.
        name: how messages call it.

    Raises:
        NestedAttentionError: not a picture, damaged, smaller than 16 pixels, larger than 40 megapixels, or more than
            8 times as long as wide.
    """
    if isinstance(source, str | Path):
        name = Path(source).name if name == "the picture" else name
    image = _open(source, name)
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise NestedAttentionError(
            f"{name} has {width * height / 1e6:.0f} megapixels ({width} x {height}); at most {MAX_MEGAPIXELS:.0f} are read. "
            "Save a smaller copy and try that."
        )
    if min(width, height) < MIN_SIDE:
        raise NestedAttentionError(
            f"{name} is only {width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed to see a subject."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise NestedAttentionError(f"{name} is {width} x {height} pixels, a strip rather than a picture; crop it to the subject first.")
    try:
        return _upright_rgb(image)
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError, struct.error) as error:
        raise NestedAttentionError(f"{name} is damaged or cut off and cannot be read; save it again as PNG or JPEG.") from error


def _open(source: ImageSource, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)):
            raise NestedAttentionError(
                f"{name} is an array of {source.dtype} {source.shape}; give uint8 of shape (H, W), (H, W, 3) or (H, W, 4)."
            )
        return Image.fromarray(source)
    if isinstance(source, bytes) and not source:
        raise NestedAttentionError(f"{name} is empty (0 bytes); choose the file again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError as error:
        raise NestedAttentionError(f"there is no file {name}; check the path.") from error
    except Image.DecompressionBombError as error:
        raise NestedAttentionError(
            f"{name} has far too many pixels; at most {MAX_MEGAPIXELS:.0f} megapixels are read. Save a smaller copy."
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise NestedAttentionError(f"{name} is not a picture that can be read; use PNG, JPEG or WebP.") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel, or a float, which may run from 0 to 1
        values = np.asarray(image, np.float64)
        highest = values.max()
        top = 65535.0 if highest > 255 else 1.0 if image.mode == "F" and highest <= 1 else 255.0
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (*WHITE, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")


def padded_square(image: Image.Image, size: int) -> Image.Image:
    """The whole picture, scaled to fit `size x size`, its border colour (median of the edge) around it."""
    scale = size / max(image.size)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    if fitted.size == (size, size):
        return fitted
    canvas = Image.new("RGB", (size, size), edge_colour(np.asarray(fitted)))
    canvas.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return canvas


def edge_colour(pixels: np.ndarray) -> tuple[int, int, int]:
    """The median colour of the border of `(H, W, 3)`: what is laid around a picture that does not fill its frame."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (int(value) for value in np.median(edge, 0))
    return red, green, blue
