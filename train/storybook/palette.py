"""Named colours, as `(R, G, B)` in 0..1. A colour's name is the word that captions use for it."""

import numpy as np

Colour = tuple[float, float, float]


def rgb(hex_code: str) -> Colour:
    """`"#c93305"` -> `(0.788, 0.2, 0.02)`."""
    value = int(hex_code.lstrip("#"), 16)
    return (value >> 16 & 255) / 255, (value >> 8 & 255) / 255, (value & 255) / 255


HAIR = {
    name: rgb(code)
    for name, code in {
        "black": "#26211f", "brown": "#6b3f22", "ginger": "#d2601a", "blond": "#e9c46a", "platinum": "#f1e6cf",
        "grey": "#9b9b9b", "red": "#b3202a", "pink": "#f27fb2", "blue": "#3f7fd6", "green": "#4fa657",
    }.items()
}  # fmt: skip
SKIN = {
    name: rgb(code)
    for name, code in {
        "porcelain": "#ffe3cb", "peach": "#f2c29b", "tan": "#d99a66", "bronze": "#b06a36", "brown": "#80492a",
        "ebony": "#4f2f22",
    }.items()
}  # fmt: skip
GARMENT = {
    name: rgb(code)
    for name, code in {
        "red": "#d92b2b", "orange": "#f28c28", "yellow": "#f7d038", "green": "#3ca04b", "blue": "#2f6fd0",
        "purple": "#7e3fb5", "pink": "#f58ab8", "white": "#f4f4f4", "black": "#2b2b33",
    }.items()
}  # fmt: skip
FUR = {
    name: rgb(code)
    for name, code in {
        "black": "#4a4a52", "grey": "#9aa0a8", "white": "#f3efe6", "cream": "#f1d9a7", "orange": "#f0954a",
        "brown": "#96663f", "red": "#d5534b", "pink": "#f2a0c0", "lilac": "#b79be0", "blue": "#7fb2f0",
        "teal": "#58b8ad", "lime": "#a9d45c",
    }.items()
}  # fmt: skip
PAINT = {
    name: rgb(code)
    for name, code in {
        "red": "#e03137", "orange": "#f5832a", "yellow": "#f8cf33", "lime": "#93cc3d", "green": "#2f9450",
        "teal": "#27a59d", "sky": "#58b4ee", "blue": "#2f5fcb", "purple": "#8446bd", "pink": "#f36ba8",
        "white": "#f2f2f2", "black": "#3a3a42",
    }.items()
}  # fmt: skip
BACKDROP = {
    name: rgb(code)
    for name, code in {
        "white": "#fbfbfb", "blue": "#8db9ee", "pink": "#f6b6d2", "yellow": "#f8e08a", "green": "#a5d8a2",
        "grey": "#b9bcc4",
    }.items()
}  # fmt: skip


def as_array(colour: Colour) -> np.ndarray:
    return np.asarray(colour, np.float32)
