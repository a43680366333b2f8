"""What is in picture `i` of a split: a pure function of `(split, i)`, the same on every machine."""

import hashlib
import random
from dataclasses import dataclass

from train.storybook.kinds import KINDS
from train.storybook.kinds.base import Values
from train.storybook.scenes import CANVAS, LANDSCAPES, PLAIN, SCENES, VARIANTS
from train.storybook.styles import STYLES

SPLITS = {"train": range(0, 70), "validation": range(70, 80), "test": range(80, 100)}  # percent of identities, by hash


@dataclass(frozen=True)
class Character:
    """One subject: who it is and how it appears this time."""

    kind: str
    identity: Values
    attributes: Values


@dataclass(frozen=True)
class Placed:
    """A character in the picture: centre `x` in 0..1, `size` as a fraction of the picture's side."""

    character: Character
    x: float
    size: float

    def square(self) -> tuple[int, int, int]:
        """The square of pixels that it is drawn in: `(left, top, side)`. It ends at the picture's lower edge."""
        side = round(self.size * CANVAS)
        return round(self.x * CANVAS - side / 2), CANVAS - side, side


@dataclass(frozen=True)
class Picture:
    """Everything that a picture shows. Subjects are ordered from left to right."""

    scene: str
    variant: int
    style: str
    subjects: tuple[Placed, ...]


def split_of(kind: str, identity: Values) -> str:
    """The one split in which this identity may appear."""
    text = kind + "|" + "|".join(f"{field}={identity[field]}" for field in sorted(identity))
    percent = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    return next(split for split, percents in SPLITS.items() if percent in percents)


def sample_values(fields: dict[str, tuple[str, ...]], rng: random.Random) -> Values:
    """One value a field; "none" is given three times in ten on top of its share."""
    return {field: "none" if "none" in values and rng.random() < 0.3 else rng.choice(values) for field, values in fields.items()}


def sample_identity(kind: str, split: str, rng: random.Random) -> Values:
    while True:
        identity = KINDS[kind].normal(sample_values(KINDS[kind].identity, rng))
        if split_of(kind, identity) == split:
            return identity


def sample_attributes(kind: str, split: str, rng: random.Random, avoid: Values | None = None) -> Values:
    """New attributes. Training never shows a held-out pair; no value equals the one in `avoid`."""
    while True:
        attributes = sample_values(KINDS[kind].attributes, rng)
        if avoid and any(attributes[field] == avoid[field] for field in attributes):
            continue
        if split != "train" or KINDS[kind].allowed(attributes):
            return attributes


def sample_character(kind: str, split: str, rng: random.Random) -> Character:
    return Character(kind, sample_identity(kind, split, rng), sample_attributes(kind, split, rng))


def sample_scene(rng: random.Random) -> tuple[str, int]:
    """Landscapes three times out of four."""
    return rng.choice(tuple(LANDSCAPES) if rng.random() < 0.75 else PLAIN), rng.randrange(VARIANTS)


def sample_style(rng: random.Random) -> str:
    """Plain seven times out of ten."""
    return "plain" if rng.random() < 0.7 else rng.choice([style for style in STYLES if style != "plain"])


def place(characters: list[Character], rng: random.Random) -> tuple[Placed, ...]:
    """One subject in the middle or a smaller one off it, or two side by side.

    Few sizes at few places: how a character looks there is worth learning, where its outline falls within a patch is not.
    """
    if len(characters) == 1:
        x, size = rng.choice(((0.5, 0.875), (0.5, 0.875), (0.4375, 0.75), (0.5625, 0.75)))
        return (Placed(characters[0], x, size),)
    return tuple(Placed(character, x, rng.choice((0.5625, 0.625))) for character, x in zip(characters, (0.25, 0.75), strict=True))


def sample_picture(split: str, index: int, kinds: tuple[str, ...] | None = None) -> Picture:
    """Picture `index` of `split`. `kinds` fixes who is in it; otherwise one subject (70 %) or two, of any kinds."""
    rng = random.Random(f"picture/{split}/{index}/{kinds or ''}")
    if kinds is None:
        kinds = tuple(rng.choice(tuple(KINDS)) for _ in range(1 if rng.random() < 0.7 else 2))
    scene, variant = sample_scene(rng)
    style = sample_style(rng)
    characters = [sample_character(kind, split, rng) for kind in kinds]
    return Picture(scene, variant, style, place(characters, rng))


def sample_reference(target: Picture, which: int, split: str, index: int) -> Picture:
    """A picture of the same identity as subject `which` of `target`, alone, with nothing else in common.

    Every attribute and the scene differ from the target's, size and place are free (whoever takes a photo does not know
    our grid); one reference in five is restyled, keeping colours.
    """
    rng = random.Random(f"reference/{split}/{index}/{which}")
    character = target.subjects[which].character
    attributes = sample_attributes(character.kind, split, rng, avoid=character.attributes)
    scene = rng.choice([scene for scene in (PLAIN if rng.random() < 0.5 else SCENES) if scene != target.scene])
    style = rng.choice([name for name, style in STYLES.items() if style.keeps_colour]) if rng.random() < 0.2 else "plain"
    seen = Placed(Character(character.kind, character.identity, attributes), 0.5 + rng.uniform(-0.06, 0.06), rng.uniform(0.72, 0.96))
    return Picture(scene, rng.randrange(VARIANTS), style, (seen,))
