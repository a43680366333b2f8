"""The finished examples of the start page: reference pictures, prompt, and the pictures that came out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nested_attention.bases import ASSETS
from nested_attention.provenance import read_provenance
from nested_attention.ui.studio import Slot

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
    """The examples in `assets/examples/examples.json`; none if the file is not there."""
    path = FOLDER / "examples.json"
    if not path.exists():
        return []
    return [
        Example(
            entry["title"], entry["prompt"], entry["seed"],
            tuple(Slot(slot["kind"], tuple(str(FOLDER / name) for name in slot["files"])) for slot in entry["slots"]),
            tuple(str(FOLDER / name) for name in entry["results"]),
        )
        for entry in json.loads(path.read_text())
    ]  # fmt: skip


def example_sources(examples: Sequence[Example]) -> dict[str, Slot]:
    """`Session.sources` of the shipped reference pictures, by the hashes that the examples' own PNGs carry."""
    sources: dict[str, Slot] = {}
    for example in examples:
        for note, slot in zip(read_provenance(example.results[0]).subjects, example.slots, strict=True):
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
