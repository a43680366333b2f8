"""The base models that are known by name. A preset is data; every base runs through the same classes."""

from dataclasses import dataclass
from pathlib import Path

from nested_attention.errors import NestedAttentionError

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Base:
    """A text-to-image base model and the settings it likes.

    Attributes:
        name: how `from_pretrained` and adapters call it.
        source: a diffusers folder, or a Hub repo id.
        revision: commit of the repo; None for a folder.
        adapters: folder with adapters that come along, or None.
        steps, guidance_scale, negative_prompt: defaults of a generation.
        fast_steps: enough for a quick look.
        size: default side in pixels. `sizes`: smallest and largest side, and what both sides are multiples of.
        licence: of the weights.
    """

    name: str
    source: str
    revision: str | None
    adapters: Path | None
    steps: int
    fast_steps: int
    guidance_scale: float
    negative_prompt: str
    size: int
    sizes: tuple[int, int, int]
    licence: str


BASES = {
    base.name: base
    for base in (
        Base(
            "storybook", str(ASSETS / "storybook/base"), None, ASSETS / "storybook/adapters", steps=24, fast_steps=10,
            guidance_scale=2.5, negative_prompt="", size=128, sizes=(128, 128, 8), licence="MIT",
        ),
    )
}  # fmt: skip


def find_base(name: str) -> Base:
    """The preset called `name`.

    Raises:
        NestedAttentionError: there is none.
    """
    if name not in BASES:
        raise NestedAttentionError(f"there is no base model called {name!r}; known are {', '.join(BASES)}.")
    return BASES[name]
