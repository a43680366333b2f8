"""Pictures carry how they were made: settings and subjects as JSON in a PNG text chunk, and back."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from nested_attention.errors import NestedAttentionError
from nested_attention.settings import Settings

CHUNK = "nested_attention"


@dataclass(frozen=True)
class SubjectNote:
    """What is remembered of a subject: its knobs, and hashes of its pictures instead of the pictures themselves."""

    placeholder: str
    kind: str
    strength: float
    lam: float
    token_weight: float
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """How a picture was made. Drawing it again takes these settings, and the same reference pictures."""

    base: str
    settings: Settings
    subjects: tuple[SubjectNote, ...]

    def save(self, image: Image.Image, path: Path) -> None:
        """Writes `image` as a PNG that carries this."""
        info = PngInfo()
        info.add_text(CHUNK, json.dumps(asdict(self)))
        image.save(path, format="PNG", pnginfo=info)


def read_provenance(path: str | Path) -> Provenance:
    """What a PNG made here carries.

    Raises:
        NestedAttentionError: the file is no picture, or does not carry anything of ours.
    """
    name = Path(path).name
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise NestedAttentionError(f"{name} is not a picture that can be read; drop a PNG that was made here.") from error
    if text is None:
        raise NestedAttentionError(
            f"{name} carries no settings; drop a PNG that was downloaded here (copies from chats and editors lose them)."
        )
    try:
        content: dict[str, Any] = json.loads(text)
        notes = tuple(SubjectNote(**{**note, "pictures": tuple(note["pictures"])}) for note in content["subjects"])
        return Provenance(content["base"], Settings(**content["settings"]), notes)
    except (ValueError, TypeError, KeyError) as error:
        raise NestedAttentionError(f"the settings in {name} are damaged ({error}); set them by hand.") from error
