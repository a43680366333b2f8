"""Drawing a `Picture`: the image and its exact ground truth."""

from dataclasses import dataclass

import numpy as np

from train.storybook.kinds import KINDS
from train.storybook.sampling import Picture
from train.storybook.scenes import CANVAS, background, paste
from train.storybook.styles import STYLES

SLOT = 16  # part p of subject s is s * SLOT + p in a part map; 0 is background


@dataclass(frozen=True)
class Render:
    """`image (128, 128, 3)` uint8 RGB and `parts (128, 128)` uint8, see `SLOT`."""

    picture: Picture
    image: np.ndarray
    parts: np.ndarray

    def subject_mask(self, which: int) -> np.ndarray:
        """Pixels where subject `which` is visible, `(128, 128)` bool."""
        return (self.parts > which * SLOT) & (self.parts < (which + 1) * SLOT)

    def part_mask(self, which: int, part: str) -> np.ndarray:
        """Visible pixels of one named part of subject `which`, `(128, 128)` bool."""
        names = KINDS[self.picture.subjects[which].character.kind].parts
        return self.parts == which * SLOT + names.index(part) + 1

    def box(self, which: int) -> tuple[int, int, int, int]:
        """`(left, top, right, bottom)` of the visible subject in pixels, right and bottom exclusive."""
        rows, columns = np.nonzero(self.subject_mask(which))
        return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def render(picture: Picture) -> Render:
    image = background(picture.scene, picture.variant).copy()
    part_map = np.zeros((CANVAS, CANVAS), np.uint8)
    for which, placed in enumerate(picture.subjects):
        character = placed.character
        left, top, size = placed.square()
        rgba, parts = KINDS[character.kind].draw(character.identity, character.attributes).resized(size)
        rows, columns, *inside = paste(image, rgba, left, top)
        visible = parts[tuple(inside)]
        np.copyto(part_map[rows, columns], visible + np.uint8(which * SLOT), where=visible > 0)
    image = STYLES[picture.style].apply(image)
    return Render(picture, (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), part_map)
