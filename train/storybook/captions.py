"""Saying what a picture shows, in several ways, with any subset of its attributes."""

import random
import re
from dataclasses import dataclass

from train.storybook.kinds import KINDS
from train.storybook.sampling import Picture
from train.storybook.scenes import words
from train.storybook.styles import STYLES


@dataclass(frozen=True)
class Caption:
    """`text`, and what of the picture it states.

    `nouns[k]` is where subject `k` is named, as `(start, end)` in `text`; `mentioned[k]` are the fields said of it.
    """

    text: str
    nouns: tuple[tuple[int, int], ...]
    mentioned: tuple[frozenset[str], ...]
    scene: bool
    style: bool


def caption(picture: Picture, rng: random.Random, names: tuple[str | None, ...] = (), thorough: float = 0.75) -> Caption:
    """A caption of `picture`.

    Args:
        rng: chooses template, synonyms and what to mention.
        names: `names[k]` replaces the noun of subject `k`, for instance by "<person>"; None keeps the noun.
        thorough: probability with which each attribute and the scene is mentioned. A style that is not plain always is.
    """
    sides = len(picture.subjects) == 2 and rng.random() < 0.3
    said, mentioned = [], []
    for which, placed in enumerate(picture.subjects):
        character, kind = placed.character, KINDS[placed.character.kind]
        fields = frozenset(field for field in kind.attributes if rng.random() < thorough)
        name = names[which] if which < len(names) else None
        phrases = kind.phrases(character.attributes, fields, rng)
        rng.shuffle(phrases)
        side = f" on the {('left', 'right')[which]}" if sides else ""
        noun = kind.noun(character.identity, rng)
        if rng.random() < 0.15:  # people also type "drawing of man in the snow"
            noun = noun.removeprefix("a ").removeprefix("an ")
        said.append(f"\x01{name or noun}\x02" + side + (" " if phrases else "") + joined(phrases, rng))
        mentioned.append(fields)
    subjects = rng.choice((" and ", " and ", " next to ", " with ")).join(said)
    scene = words_of_scene(picture, rng) if rng.random() < max(thorough, 0.85) else ""
    before, after = style_words(picture, rng)
    order = rng.random()
    if scene and order < 0.2:
        text = ", ".join(filter(None, (f"{before} {subjects}".strip() if before else subjects, scene, after)))
    elif scene and order < 0.35:
        text = ", ".join(filter(None, (scene, f"{before} {subjects}".strip(), after)))
    else:
        text = ", ".join(filter(None, (f"{before} {subjects} {scene}".strip(), after)))
    text, nouns = unmarked(text)
    return Caption(text, nouns, tuple(mentioned), bool(scene), picture.style != "plain")


def unmarked(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Removes the marks around the nouns and says where the nouns stand without them."""
    spans = [(match.start() - 2 * count, match.end() - 2 * count - 2) for count, match in enumerate(re.finditer("\x01.*?\x02", text))]
    return re.sub("[\x01\x02]", "", text), tuple(spans)


def joined(phrases: list[str], rng: random.Random) -> str:
    return rng.choice((" ", ", ", " and ") if len(phrases) < 3 else (" ", ", ")).join(phrases)


def words_of_scene(picture: Picture, rng: random.Random) -> str:
    return rng.choice(words(picture.scene))


def style_words(picture: Picture, rng: random.Random) -> tuple[str, str]:
    """`(before, after)`: the style is said once, in front of the subject or at the end."""
    style = STYLES[picture.style]
    if rng.random() < 0.7:
        return rng.choice(style.before), ""
    return rng.choice(STYLES["plain"].before), rng.choice(style.after)
