"""The finished examples of the start page: reference pictures, prompt, and the pictures that came out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nested_attention.bases import ASSETS
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.provenance import read_provenance
from nested_attention.ui.session import Slot

FOLDER = ASSETS / "examples"


@dataclass(frozen=True)
class Example:
    """A whole set-up that one click fills in. Paths are absolute."""

    title: str
    prompt: str
    seed: int
    slots: tuple[Slot, ...]
    results: tuple[str, ...]


def load_examples() -> list[Example]:
    """The examples in `assets/examples/examples.json`; none if the file is not there.

    Raises:
        NestedAttentionError: it is damaged, or a picture of it is missing.
    """
    path = FOLDER / "examples.json"
    if not path.exists():
        return []
    try:
        examples = [
            Example(
                entry["title"], entry["prompt"], entry["seed"],
                tuple(Slot(slot["kind"], tuple(picture(name) for name in slot["files"])) for slot in entry["slots"]),
                tuple(picture(name) for name in entry["results"]),
            )
            for entry in json.loads(path.read_text())
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    return examples


def picture(name: str) -> str:
    """The path of an example's picture.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not (path := FOLDER / name).is_file():
        raise FileNotFoundError(f"{name} is missing")
    return str(path)


def damaged(path: Path, error: Exception) -> NestedAttentionError:
    return NestedAttentionError(f"the examples of the page cannot be read from {path} ({error}); {get_back(path.parent)}.")


def example_sources(examples: Sequence[Example]) -> dict[str, Slot]:
    """`Session.sources` of the shipped reference pictures, by the hashes that the examples' own PNGs carry.

    Raises:
        NestedAttentionError: a PNG is damaged.
    """
    sources: dict[str, Slot] = {}
    for example in examples:
        try:
            notes = read_provenance(example.results[0]).subjects
        except NestedAttentionError as error:
            raise damaged(Path(example.results[0]), error) from error
        for note, slot in zip(notes, example.slots, strict=True):
            sources |= {picture: replace(slot, files=(file,)) for picture, file in zip(note.pictures, slot.files, strict=False)}
    return sources


READY_MADE = (
    "a drawing of <person> smiling, wearing a red hoodie, in the snow",
    "<person> with sunglasses in a blue blazer on the beach",
    "<person> and <cat> on the beach",
    "a pencil sketch of <person> in the mountains",
    "pixel art of <cat> wearing a red scarf in space",
    "<vehicle> carrying a gift in the desert",
    "a drawing of <person> crying next to <cat> grinning at night",
)
