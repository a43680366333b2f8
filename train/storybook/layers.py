"""A part of a picture that can be drawn in any colour.

A `Layer` is affine in its colour: `rgb = base + tint * colour` (premultiplied by alpha). That holds exactly for
vector parts with one colour slot under black or white shading, and is what "tinting" means for painted parts.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from train.storybook.palette import Colour, as_array

NATIVE = 144  # side in pixels at which a subject is composed before it is scaled into the picture


@dataclass(frozen=True)
class Layer:
    """One part, cropped to its bounding box. `base (h, w, 3)`, `alpha (h, w, 1)`, `tint (h, w, 1)`, float32 in 0..1."""

    base: np.ndarray
    alpha: np.ndarray
    tint: np.ndarray
    top: int
    left: int

    @classmethod
    def crop(cls, base: np.ndarray, alpha: np.ndarray, tint: np.ndarray) -> "Layer":
        """Keep only the rows and columns where something is drawn."""
        rows, columns = np.nonzero(alpha[..., 0] > 1 / 255)
        if not len(rows):
            rows, columns = np.zeros(1, int), np.zeros(1, int)
        window = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        base, alpha, tint = (np.ascontiguousarray(array[window], np.float32) for array in (base, alpha, tint))
        return cls(base, alpha, tint, int(rows.min()), int(columns.min()))


class Drawing:
    """A subject under construction: premultiplied `rgba (H, W, 4)` and the part visible at each pixel, `parts (H, W)`.

    A pixel's part is the number of the topmost layer that covers more than half of it; 0 is "nothing".
    """

    def __init__(self, size: int = NATIVE):
        self.rgba = np.zeros((size, size, 4), np.float32)
        self.parts = np.zeros((size, size), np.uint8)

    def add(self, layer: Layer, part: int, colour: Colour = (0.0, 0.0, 0.0)) -> None:
        """Put `layer` on top, in `colour`, and mark what it covers as `part`."""
        height, width = layer.alpha.shape[:2]
        window = (slice(layer.top, layer.top + height), slice(layer.left, layer.left + width))
        below = self.rgba[window]
        below *= 1 - layer.alpha
        below[..., :3] += layer.base + layer.tint * as_array(colour)
        below[..., 3:] += layer.alpha
        self.parts[window][layer.alpha[..., 0] > 0.5] = part

    def resized(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`(rgba, parts)` at `size x size` pixels."""
        rgba = cv2.resize(self.rgba, (size, size), interpolation=cv2.INTER_AREA)
        return rgba, cv2.resize(self.parts, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
