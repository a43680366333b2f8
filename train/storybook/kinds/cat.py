"""Cats (David Revoy): outline, colour and pattern of the fur stay; expression and accessory change."""

import random

from train.storybook.artwork import cat
from train.storybook.kinds.base import Kind, Values
from train.storybook.layers import Drawing
from train.storybook.palette import FUR

BODIES = {
    "curly": "body0", "sleek": "body1", "tufted": "body2", "horned": "body3", "spiky": "body4", "ringlet": "body6",
    "blocky": "body7", "wild": "body9", "smooth": "body12", "fluffy": "body13",
}  # fmt: skip
PATTERNS = {
    "plain": "", "tiger": "fur0", "striped": "fur1", "swirled": "fur3", "patched": "fur4", "white-faced": "fur5",
    "blotched": "fur8", "speckled": "fur9",
}  # fmt: skip
TONES = {"dark": (0.2, 0.16, 0.16), "light": (0.98, 0.96, 0.9)}
EXPRESSIONS = {  # eyes, mouth
    "neutral": ("eyes0", "mouth1"), "smiling": ("eyes9", "mouth4"), "sleepy": ("eyes6", "mouth6"),
    "surprised": ("eyes13", "mouth3"), "grumpy": ("eyes10", "mouth1"), "grinning": ("eyes5", "mouth8"),
}  # fmt: skip
ACCESSORIES = {
    "none": "", "red scarf": "accessory0", "blue scarf": "accessory7", "red bow": "accessory4", "blue bow": "accessory12",
    "black hat": "accessory5", "red hat": "accessory13", "red headband": "accessory3", "bandana": "accessory11",
}  # fmt: skip

PARTS = ("body", "pattern", "eyes", "mouth", "accessory")


def draw(identity: Values, attributes: Values) -> Drawing:
    part = {name: number for number, name in enumerate(PARTS, 1)}
    eyes, mouth = EXPRESSIONS[attributes["expression"]]
    drawing = Drawing()
    drawing.add(cat("000#00body", BODIES[identity["body"]], tinted=True), part["body"], FUR[identity["fur"]])
    if pattern := PATTERNS[identity["pattern"]]:
        drawing.add(cat("001#01fur", pattern, tinted=True), part["pattern"], TONES[identity["pattern tone"]])
    drawing.add(cat("002#02eyes", eyes), part["eyes"])
    drawing.add(cat("003#03mouth", mouth), part["mouth"])
    if accessory := ACCESSORIES[attributes["accessory"]]:
        drawing.add(cat("004#04accessories", accessory), part["accessory"])
    return drawing


def normal(identity: Values) -> Values:
    """A plain fur has no pattern whose tone could be seen."""
    return identity | {"pattern tone": "dark"} if identity["pattern"] == "plain" else identity


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
    identity={"body": tuple(BODIES), "fur": tuple(FUR), "pattern": tuple(PATTERNS), "pattern tone": tuple(TONES)},
    attributes={"expression": tuple(EXPRESSIONS), "accessory": tuple(ACCESSORIES)},
    parts=PARTS,
    held_out=frozenset({("sleepy", "black hat"), ("grumpy", "red bow"), ("smiling", "blue scarf")}),
    draw=draw,
    noun=noun,
    phrases=phrases,
    normal=normal,
)
