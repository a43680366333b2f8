"""Cats (David Revoy): outline, colour and markings of the fur stay; expression and accessory change."""

import random
from functools import cache

import cv2
import numpy as np

from train.storybook.artwork import cat
from train.storybook.kinds.base import Kind, Values
from train.storybook.layers import NATIVE, Drawing, Layer
from train.storybook.palette import FUR

BODIES = {"curly": "body0", "blocky": "body7", "wild": "body9", "smooth": "body12"}

# marking -> polygons of the body that have its colour, in hundredths of the side
TAIL = ((0, 0), (20, 0), (20, 30), (16, 45), (14, 60), (28, 88), (28, 100), (0, 100))
MARKINGS = {
    "hood": (((24, 0), (100, 0), (100, 34), (24, 34)),),
    "muzzle": (((36, 46), (48, 38), (62, 35), (76, 38), (88, 46), (86, 68), (38, 68)),),
    "bib": (((30, 67), (100, 67), (100, 100), (30, 100)),),
    "points": (TAIL, ((24, 0), (45, 0), (45, 14), (24, 22)), ((68, 0), (96, 0), (96, 22), (68, 14)), ((30, 93), (100, 93), (100, 100), (30, 100))),
    "half": (((62, 0), (100, 0), (100, 100), (62, 100)),),
    "banded": (((0, 15), (22, 15), (22, 32), (0, 32)), ((0, 48), (22, 48), (22, 62), (0, 62)), ((24, 24), (100, 24), (100, 33), (24, 33)),
               ((24, 52), (100, 52), (100, 60), (24, 60)), ((30, 76), (100, 76), (100, 86), (30, 86))),
}  # fmt: skip
MARKING_COLOURS = ("white", "black", "brown", "orange", "pink", "blue")
EXPRESSIONS = {  # eyes, mouth
    "neutral": ("eyes0", "mouth1"), "smiling": ("eyes9", "mouth4"), "sleepy": ("eyes6", "mouth6"),
    "surprised": ("eyes13", "mouth3"), "grumpy": ("eyes10", "mouth1"), "grinning": ("eyes5", "mouth8"),
}  # fmt: skip
ACCESSORIES = {
    "none": "", "red scarf": "accessory0", "blue scarf": "accessory7", "red bow": "accessory4", "blue bow": "accessory12",
    "black hat": "accessory5", "red hat": "accessory13", "red headband": "accessory3", "bandana": "accessory11",
}  # fmt: skip

PARTS = ("body", "marking", "eyes", "mouth", "accessory")


@cache
def marking(body: str, name: str) -> Layer:
    """The part of a body that has the second colour, with the body's own shading."""
    layer = cat("000#00body", BODIES[body], tinted=True)
    area = np.zeros((NATIVE * 4, NATIVE * 4), np.uint8)
    for polygon in MARKINGS[name]:
        cv2.fillPoly(area, [(np.array(polygon) * NATIVE * 4 / 100).astype(np.int32)], 255)
    height, width = layer.alpha.shape[:2]
    inside = cv2.resize(area, (NATIVE, NATIVE), interpolation=cv2.INTER_AREA)[
        layer.top : layer.top + height, layer.left : layer.left + width
    ]
    share = inside[..., None].astype(np.float32) / 255
    return Layer(layer.base * share, layer.alpha * share, layer.tint * share, layer.top, layer.left)


def draw(identity: Values, attributes: Values) -> Drawing:
    part = {name: number for number, name in enumerate(PARTS, 1)}
    eyes, mouth = EXPRESSIONS[attributes["expression"]]
    drawing = Drawing()
    drawing.add(cat("000#00body", BODIES[identity["body"]], tinted=True), part["body"], FUR[identity["fur"]])
    drawing.add(marking(identity["body"], identity["marking"]), part["marking"], FUR[identity["marking colour"]])
    drawing.add(cat("002#02eyes", eyes), part["eyes"])
    drawing.add(cat("003#03mouth", mouth), part["mouth"])
    if accessory := ACCESSORIES[attributes["accessory"]]:
        drawing.add(cat("004#04accessories", accessory), part["accessory"])
    return drawing


def normal(identity: Values) -> Values:
    """A marking in the colour of the fur could not be seen; it takes the next colour."""
    if identity["marking colour"] != identity["fur"]:
        return identity
    after = MARKING_COLOURS.index(identity["marking colour"]) + 1
    return identity | {"marking colour": MARKING_COLOURS[after % len(MARKING_COLOURS)]}


def noun(identity: Values, rng: random.Random) -> str:
    return rng.choice(("a cat", "a cat", "a cat", "a kitten", "a kitty"))


SAID = {
    "neutral": ("looking calm", "with a neutral expression"),
    "smiling": ("smiling", "smiling happily", "with a smile", "looking happy"),
    "sleepy": ("sleepy", "with closed eyes", "sleeping", "looking tired"),
    "surprised": ("surprised", "looking surprised", "with an open mouth", "shocked"),
    "grumpy": ("grumpy", "looking angry", "with an angry look", "angry"),
    "grinning": ("grinning", "showing teeth", "with a big grin"),
}


def phrases(attributes: Values, mentioned: frozenset[str], rng: random.Random) -> list[str]:
    said = []
    if "expression" in mentioned:
        said.append(rng.choice(SAID[attributes["expression"]]))
    if "accessory" in mentioned and attributes["accessory"] != "none":
        said.append(rng.choice(("with a {}", "wearing a {}", "wearing a {}")).format(attributes["accessory"]))
    return said


KIND = Kind(
    name="cat",
    identity={"body": tuple(BODIES), "fur": tuple(FUR), "marking": tuple(MARKINGS), "marking colour": MARKING_COLOURS},
    attributes={"expression": tuple(EXPRESSIONS), "accessory": tuple(ACCESSORIES)},
    parts=PARTS,
    held_out=frozenset({("sleepy", "black hat"), ("grumpy", "red bow"), ("smiling", "blue scarf")}),
    draw=draw,
    noun=noun,
    phrases=phrases,
    normal=normal,
)
