"""Where a picture takes place: ten landscapes (vector ground, Fluent props) and six plain colours.

A landscape has four fixed variants (two sets of props, each also mirrored): little is left to chance that no prompt
controls, so that training goes into the subjects.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from train.storybook.artwork import SVG, emoji, rasterize
from train.storybook.palette import BACKDROP

CANVAS = 128  # side of every Storybook picture in pixels
VARIANTS = 4


@dataclass(frozen=True)
class Prop:
    """A Fluent emoji: name, centre x, bottom y, size; all in pixels of the 128-pixel picture."""

    name: str
    x: int
    bottom: int
    size: int


@dataclass(frozen=True)
class Scene:
    """A landscape. `ground`: SVG elements in 128 x 128 units; `props`: two alternatives; `words`: ways to say it."""

    words: tuple[str, ...]
    ground: str
    props: tuple[tuple[Prop, ...], tuple[Prop, ...]]


def rect(y: int, height: int, fill: str) -> str:
    return f'<rect y="{y}" width="128" height="{height}" fill="{fill}"/>'


def hill(path: str, fill: str) -> str:
    return f'<path d="{path}" fill="{fill}"/>'


def dots(points: str, radius: float, fill: str) -> str:
    return "".join(f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{fill}"/>' for x, y in (p.split(",") for p in points.split()))


STARS = "12,14 30,40 44,10 62,24 84,12 98,34 116,20 20,62 108,58 72,48 50,58 122,44"

LANDSCAPES = {
    "beach": Scene(
        ("on the beach", "at the beach", "by the sea", "at the seaside"),
        rect(0, 64, "#9edcf7") + rect(58, 38, "#2f9fd8") + hill("M0 96 Q40 82 80 92 T128 86 V128 H0Z", "#f5dc9c"),
        ((Prop("palm-tree", 16, 98, 66), Prop("umbrella-on-ground", 112, 112, 34), Prop("sun", 106, 34, 26)),
         (Prop("palm-tree", 16, 98, 66), Prop("ring-buoy", 114, 110, 24), Prop("sun", 106, 34, 26))),
    ),
    "forest": Scene(
        ("in the forest", "in the woods", "among the trees", "in a forest"),
        rect(0, 128, "#bfe6c4") + hill("M0 60 Q30 44 64 58 T128 52 V128 H0Z", "#6fb36b") + hill("M0 92 Q50 80 128 92 V128 H0Z", "#3f8a47"),
        ((Prop("evergreen-tree", 16, 96, 60), Prop("deciduous-tree", 112, 98, 66), Prop("mushroom", 118, 120, 18)),
         (Prop("evergreen-tree", 18, 98, 68), Prop("evergreen-tree", 110, 94, 56), Prop("mushroom", 10, 120, 18))),
    ),
    "desert": Scene(
        ("in the desert", "in a sandy desert", "among the dunes", "in the dunes"),
        rect(0, 128, "#fbd38d") + hill("M0 74 Q34 50 70 72 T128 62 V128 H0Z", "#eaa95a") + hill("M0 100 Q60 80 128 98 V128 H0Z", "#d98b3f"),
        ((Prop("cactus", 16, 104, 50), Prop("camel", 110, 92, 36), Prop("sun", 102, 34, 28)),
         (Prop("cactus", 16, 104, 50), Prop("cactus", 114, 96, 34), Prop("sun", 102, 34, 28))),
    ),
    "snow": Scene(
        ("in the snow", "in a snowy landscape", "on a snowy day", "in winter"),
        rect(0, 128, "#cfe3f5") + hill("M0 70 Q40 50 74 68 T128 60 V128 H0Z", "#e6f0fa") + hill("M0 98 Q60 86 128 96 V128 H0Z", "#ffffff")
        + dots("10,20 28,44 40,12 60,30 80,10 96,26 118,14 122,46 20,72 106,70 52,52 74,46", 2, "#ffffff"),
        ((Prop("snowman-without-snow", 16, 112, 40), Prop("evergreen-tree", 114, 96, 44)),
         (Prop("evergreen-tree", 14, 96, 48), Prop("snowman-without-snow", 114, 112, 36))),
    ),
    "night": Scene(
        ("at night", "under the stars", "at night by a campfire", "on a starry night"),
        rect(0, 128, "#14204a") + dots(STARS, 1.5, "#ffe9a8") + hill("M0 94 Q44 78 84 92 T128 88 V128 H0Z", "#0c1430"),
        ((Prop("crescent-moon", 106, 36, 26), Prop("tent", 18, 112, 40), Prop("fire", 114, 114, 26)),
         (Prop("full-moon", 106, 36, 26), Prop("tent", 18, 112, 40), Prop("fire", 114, 114, 26))),
    ),
    "city": Scene(
        ("in the city", "in town", "on a city street", "downtown"),
        rect(0, 128, "#cddbe9") + '<path d="M0 52h16v-16h18v26h14v-20h16v14h18v-26h20v20h14v-10h12V128H0Z" fill="#a9bbcf"/>' + rect(102, 26, "#6b7280")
        + '<path d="M4 115h20m16 0h20m16 0h20m16 0h12" stroke="#f6e27f" stroke-width="3"/>',
        ((Prop("office-building", 16, 104, 58), Prop("office-building", 112, 104, 66)),
         (Prop("office-building", 14, 104, 66), Prop("house", 112, 104, 44))),
    ),
    "mountains": Scene(
        ("in the mountains", "in front of a mountain", "high in the mountains", "in the alps"),
        rect(0, 128, "#a8d4f7") + hill("M-20 104 L26 26 L70 104Z", "#7c8798") + hill("M26 26 L14 46 L24 42 L30 48 L38 44Z", "#ffffff")
        + hill("M56 104 L104 34 L150 104Z", "#66717f") + hill("M104 34 L91 52 L102 48 L108 54 L117 50Z", "#ffffff") + hill("M0 98 Q60 86 128 98 V128 H0Z", "#7dbb6a"),
        ((Prop("evergreen-tree", 10, 106, 34), Prop("rock", 116, 116, 24)), (Prop("rock", 12, 116, 24), Prop("evergreen-tree", 118, 106, 34))),
    ),
    "space": Scene(
        ("in space", "in outer space", "among the planets", "on the moon"),
        rect(0, 128, "#2a1852") + dots(STARS, 1.5, "#ffffff") + '<ellipse cx="64" cy="136" rx="92" ry="36" fill="#8d86a8"/>' + dots("26,118 100,120", 5, "#766f92"),
        ((Prop("ringed-planet", 20, 44, 38), Prop("rocket", 110, 66, 36)), (Prop("ringed-planet", 20, 44, 38), Prop("glowing-star", 110, 46, 28))),
    ),
    "underwater": Scene(
        ("under water", "under the sea", "underwater", "at the bottom of the sea"),
        rect(0, 128, "#1aa0b8") + rect(0, 26, "#4cc3d3") + hill("M0 100 Q34 88 70 98 T128 94 V128 H0Z", "#e8cf93")
        + dots("24,30 30,18 104,40 110,26 100,16", 3, "#bdf0f5"),
        ((Prop("coral", 14, 112, 36), Prop("tropical-fish", 112, 64, 28)), (Prop("tropical-fish", 14, 66, 28), Prop("octopus", 114, 112, 32))),
    ),
    "meadow": Scene(
        ("in a meadow", "in a flower field", "among flowers", "in a garden"),
        rect(0, 128, "#bfe9fb") + hill("M0 76 Q40 60 80 74 T128 66 V128 H0Z", "#9bd66b") + hill("M0 100 Q60 88 128 100 V128 H0Z", "#7cc24e"),
        ((Prop("sunflower", 12, 108, 38), Prop("tulip", 118, 110, 30), Prop("sun", 104, 32, 24)),
         (Prop("tulip", 12, 110, 30), Prop("sunflower", 116, 108, 38), Prop("sun", 104, 32, 24))),
    ),
}  # fmt: skip

PLAIN = tuple(f"plain {colour}" for colour in BACKDROP)
SCENES = (*LANDSCAPES, *PLAIN)


def words(scene: str) -> tuple[str, ...]:
    """The ways a caption says the scene; each follows the subject ("a cat" + "on the beach")."""
    if scene in LANDSCAPES:
        return LANDSCAPES[scene].words
    colour = scene.removeprefix("plain ")
    return f"on a {colour} background", f"on a plain {colour} background", f"in front of a {colour} wall"


@cache
def background(scene: str, variant: int) -> np.ndarray:
    """The scene without subjects, RGB `(128, 128, 3)` float32 in 0..1. `variant` in 0..3."""
    if scene not in LANDSCAPES:
        return np.full((CANVAS, CANVAS, 3), BACKDROP[scene.removeprefix("plain ")], np.float32)
    landscape = LANDSCAPES[scene]
    picture = rasterize(f'<svg {SVG} viewBox="0 0 128 128" fill="none">{landscape.ground}</svg>', CANVAS)[..., :3].copy()
    for prop in landscape.props[variant // 2]:
        paste(picture, emoji(prop.name, prop.size), prop.x - prop.size // 2, prop.bottom - prop.size)
    return np.ascontiguousarray(picture[:, ::-1]) if variant % 2 else picture


def paste(picture: np.ndarray, rgba: np.ndarray, left: int, top: int) -> tuple[slice, slice, slice, slice]:
    """Composite premultiplied `rgba` onto `picture` in place, clipped at the borders.

    Returns the slices `(rows, columns)` of the picture and `(rows, columns)` of `rgba` that met.
    """
    height, width = rgba.shape[:2]
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + height, picture.shape[0]), min(left + width, picture.shape[1])
    there = slice(y0, y1), slice(x0, x1)
    here = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    picture[there] = picture[there] * (1 - rgba[here][..., 3:]) + rgba[here][..., :3]
    return *there, *here
