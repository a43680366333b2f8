"""What a photo for training is, and what every source of photos can do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from PIL import ExifTags, Image

from nested_attention.errors import NestedAttentionError
from nested_attention.images import read_image
from nested_attention.prompts import placeholders

LYING = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class PhotoSample:
    """One photo to learn from.

    Attributes:
        image: the whole photo, RGB and upright.
        reference: a square RGB picture of its subject.
        text: the caption, with a placeholder such as `<person>` for the subject.
        key: what the source calls it.
    """

    image: Image.Image
    reference: Image.Image
    text: str
    key: str


class Source(Protocol):
    """Photos by number. `size`, `caption` and `mark` do not decode the photo."""

    @property
    def shards(self) -> Sequence[int]:
        """How many photos lie together in each part of the source, in order; these are best read near each other."""

    def __len__(self) -> int: ...

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the upright photo in pixels."""

    def caption(self, index: int) -> str: ...

    def mark(self, index: int) -> str:
        """What changes when the photo, its reference or its caption is another one."""

    def __getitem__(self, index: int) -> PhotoSample: ...


def read_stored(source: bytes | Path, name: str, without: str) -> Image.Image:
    """`read_image` for the pictures of a source, of thousands of which one may be damaged. `without`: what takes it out.

    Raises:
        NestedAttentionError: it cannot be read.
    """
    try:
        return read_image(source, name)
    except NestedAttentionError as error:
        raise NestedAttentionError(f"{error} To go on without it, {without}.") from error


def checked_caption(text: str, name: str, kind: str) -> str:
    """`text` on one line.

    Raises:
        NestedAttentionError: it does not hold `<kind>` and no other placeholder. `name` is how the message calls its owner.
    """
    found = placeholders(text)
    if found != (f"<{kind}>",):
        other = f" or train with --kind {found[0][1:-1]}" if len(found) == 1 else ""
        raise NestedAttentionError(
            f'the caption of {name} names {", ".join(found) or "no placeholder"}: "{text[:80]}"; '
            f"write <{kind}>, and no other one, where the subject is meant{other}."
        )
    return " ".join(text.split())


def upright_size(file: Path | IO[bytes], name: str) -> tuple[int, int]:
    """Height and width of a picture as `read_image` gives it, from its header alone.

    Raises:
        NestedAttentionError: it is no picture.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            # a PNG would be decoded for its EXIF, and cameras write none
            lying = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation) in LYING
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise NestedAttentionError(f"{name} is not a picture that can be read; take it out, or put it in again.") from error
    return (width, height) if lying else (height, width)
