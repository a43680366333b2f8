"""Pictures carry how they were made: settings and subjects as JSON in a PNG text chunk, and back, checked: anybody can write one."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nested_attention.bases import BASES
from nested_attention.errors import NestedAttentionError
from nested_attention.faces import CHOICES, Box
from nested_attention.files import replaced
from nested_attention.prompts import PLACEHOLDER
from nested_attention.settings import MAX_SUBJECTS, Settings
from nested_attention.subjects import Subject

CHUNK = "nested_attention"
UNCUT: Box = (0.0, 0.0, 1.0, 1.0)
ANY_BASE = replace(BASES["storybook"], name="a base", sizes=(8, 8192, 8))  # a record may be of one that is not known here


@dataclass(frozen=True)
class SubjectNote:
    """What is remembered of a subject: its knobs, and hashes of its pictures instead of the pictures themselves.

    `adapter`: revision of the one that encoded it; `framing`, `crop`: how its pictures were framed (`faces.frame`). The first
    pictures made here did not tell these three.
    """

    placeholder: str
    kind: str
    strength: float
    lam: float
    token_weight: float
    pictures: tuple[str, ...]
    adapter: str = ""
    framing: str = "whole"
    crop: Box = UNCUT


@dataclass(frozen=True)
class Provenance:
    """How a picture was made. Drawing it again takes these settings, and the same reference pictures."""

    base: str
    settings: Settings
    subjects: tuple[SubjectNote, ...]

    def save(self, image: Image.Image, path: Path) -> None:
        """Writes `image` as a PNG that carries this.

        Raises:
            NestedAttentionError: it cannot be written.
        """
        info = PngInfo()
        info.add_text(CHUNK, json.dumps(asdict(self)))
        with replaced(path) as fresh:
            image.save(fresh, format="PNG", pnginfo=info)


def read_provenance(path: str | Path) -> Provenance:
    """What a PNG made here carries. Only what stands before its pixels is read.

    Raises:
        NestedAttentionError: the file is no PNG, carries nothing of ours, or something that no picture was made with.
    """
    name = Path(path).name
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(CHUNK)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NestedAttentionError(f"{name} is no PNG that can be read; drop one that was made here.") from error
    if text is None:
        raise NestedAttentionError(
            f"{name} carries no settings; drop a PNG that was downloaded here (copies from chats and editors lose them)."
        )
    try:
        return provenance_of(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NestedAttentionError(f"the settings in {name} are damaged ({str(error).rstrip('.')}); set them by hand.") from error


def provenance_of(content: Any) -> Provenance:
    """A record from its JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is none.
    """
    settings, notes = Settings(**content["settings"]), tuple(note_of(note) for note in content["subjects"])
    if not isinstance(content["base"], str):
        raise ValueError("the base is not text")
    if Settings.checked(ANY_BASE, **content["settings"]) != settings:  # which fills in what is null
        raise ValueError("a setting has no value")
    if len(notes) > MAX_SUBJECTS:
        raise ValueError(f"{len(notes)} subjects; at most {MAX_SUBJECTS} fit into one picture")
    if len({note.placeholder for note in notes}) < len(notes):
        raise ValueError("two subjects have the same placeholder")
    return Provenance(content["base"], settings, notes)


def note_of(content: Any) -> SubjectNote:
    """What a record tells of one subject; raises as `provenance_of`."""
    note = SubjectNote(**content | {"pictures": tuple(content["pictures"]), "crop": tuple(content.get("crop", UNCUT))})
    if not all(isinstance(text, str) for text in (note.placeholder, note.kind, note.adapter, note.framing, *note.pictures)):
        raise ValueError("placeholder, kind, pictures, adapter and framing of a subject have to be text")
    if not PLACEHOLDER.fullmatch(note.placeholder):
        raise ValueError(f"{note.placeholder!r} is no placeholder")
    if not CHOICES.fullmatch(note.framing):
        raise ValueError(f"there is no framing {note.framing!r}")
    numbers = note.strength, note.lam, note.token_weight, *note.crop
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise ValueError("strength, λ, token weight and crop of a subject have to be numbers")
    if len(note.crop) != len(UNCUT) or not all(0 <= side <= 1 for side in note.crop):
        raise ValueError(f"the crop {note.crop} is not four fractions from 0 to 1")
    Subject(note.placeholder, note.kind, note.kind, (), note.strength, note.lam, note.token_weight)  # raises where a knob is out of range
    return note
