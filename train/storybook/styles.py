"""How a picture is drawn: a filter over the finished picture, and the words for it."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
PAPER = np.array([0.93, 0.96, 1.0], np.float32)  # lines of a blueprint
INK = np.array([0.11, 0.3, 0.64], np.float32)  # its ground
SEPIA = np.array([1.08, 0.88, 0.66], np.float32)


@dataclass(frozen=True)
class Style:
    """`apply`: RGB `(H, W, 3)` in 0..1 -> the same, restyled. `keeps_colour`: colours can still be told.

    `before`: phrases that take the subject ("a pencil sketch of a cat"); `after`: phrases that close a caption.
    """

    apply: Callable[[np.ndarray], np.ndarray]
    keeps_colour: bool
    before: tuple[str, ...]
    after: tuple[str, ...]


def pixel_art(rgb: np.ndarray) -> np.ndarray:
    height, width = rgb.shape[:2]
    small = cv2.resize(rgb, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


def strokes(rgb: np.ndarray) -> np.ndarray:
    """Dodge of the grey picture by its blur: 1 on even areas, dark along edges. `(H, W, 1)`."""
    grey = rgb @ LUMA
    blurred = cv2.GaussianBlur(grey, (0, 0), 3)
    return np.clip(((grey + 0.06) / (blurred + 0.06) - 0.1) ** 2 * 1.2, 0, 1)[..., None]


def sketch(rgb: np.ndarray) -> np.ndarray:
    return np.repeat(0.08 + 0.9 * strokes(rgb), 3, -1)


def blueprint(rgb: np.ndarray) -> np.ndarray:
    line = 1 - strokes(rgb)
    return line * PAPER + (1 - line) * INK


def sepia(rgb: np.ndarray) -> np.ndarray:
    return np.clip((rgb @ LUMA)[..., None] * SEPIA + np.array([0.03, 0.02, 0.0], np.float32), 0, 1)


def monochrome(rgb: np.ndarray) -> np.ndarray:
    return np.repeat((rgb @ LUMA)[..., None], 3, -1)


STYLES = {
    "plain": Style(lambda rgb: rgb, True, ("a drawing of", "a picture of", "an illustration of", ""), ("", "cartoon style", "drawing")),
    "pixel art": Style(pixel_art, True, ("pixel art of", "a pixel art picture of"), ("pixel art", "in pixel art style")),
    "sketch": Style(sketch, False, ("a pencil sketch of", "a pencil drawing of", "a sketch of"), ("pencil sketch", "drawn with a pencil")),
    "blueprint": Style(blueprint, False, ("a blueprint of", "a blueprint drawing of"), ("blueprint", "in blueprint style")),
    "sepia": Style(sepia, False, ("a sepia photo of", "an old photo of", "a sepia picture of"), ("sepia", "in sepia tones")),
    "black and white": Style(monochrome, False, ("a black and white picture of", "a black and white photo of"), ("black and white", "in black and white")),
}  # fmt: skip
