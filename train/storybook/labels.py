"""What there is to know about the main subject of a view, as class numbers; -1 where a question does not apply."""

from dataclasses import dataclass

import cv2
import numpy as np

from train.storybook.kinds import KINDS
from train.storybook.sampling import Picture
from train.storybook.scenes import CANVAS, SCENES
from train.storybook.styles import STYLES

PAIR_VIEW = 78  # side in pixels of the corner that shows one of two subjects


def questions() -> dict[str, tuple[str, ...]]:
    """Name -> possible answers: scene, style, kind, and per kind its identity and attribute fields ("person hair")."""
    fields = {f"{name} {field}": values for name, kind in KINDS.items() for field, values in (kind.identity | kind.attributes).items()}
    return {"scene": SCENES, "style": tuple(STYLES), "kind": tuple(KINDS), **fields}


def answers(picture: Picture, which: int | None) -> np.ndarray:
    """Class numbers for `questions()` about subject `which`, or about the whole picture only if None."""
    known = {"scene": picture.scene, "style": picture.style}
    if which is not None:
        character = picture.subjects[which].character
        known["kind"] = character.kind
        known |= {f"{character.kind} {field}": value for field, value in (character.identity | character.attributes).items()}
    return np.array([values.index(known[name]) if name in known else -1 for name, values in questions().items()], np.int64)


def view(image: np.ndarray, which: int | None, count: int) -> np.ndarray:
    """What shows subject `which` of `count`: the whole picture, or for two its lower left or right corner, enlarged."""
    if count == 1 or which is None:
        return image
    left = 0 if which == 0 else CANVAS - PAIR_VIEW
    corner = image[CANVAS - PAIR_VIEW :, left : left + PAIR_VIEW]
    return cv2.resize(corner, (CANVAS, CANVAS), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class View:
    """An image `(128, 128, 3)` uint8 with the answers about it."""

    image: np.ndarray
    answers: np.ndarray
