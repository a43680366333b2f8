"""People (avataaars): hair, skin, beard and brows stay; expression, garment and eyewear change."""

import random

from train.storybook.artwork import avataaars
from train.storybook.kinds.base import Kind, Values, article
from train.storybook.layers import Drawing
from train.storybook.palette import GARMENT, HAIR, SKIN

HAIRCUTS = {  # each with an outline of its own
    "long": ("bob", "bun", "curly", "dreads", "straight02"),
    "either": ("fro", "shaggy", "shaggyMullet", "dreads02"),
    "short": ("frizzle", "sides", "theCaesar"),
}
BEARDS = {"none": "", "light": "beardLight", "majestic": "beardMajestic", "moustache": "moustacheMagnum"}
BROWS = {"soft": "defaultNatural", "flat": "flatNatural", "joined": "unibrowNatural"}
EXPRESSIONS = {  # eyes, mouth
    "neutral": ("default", "serious"), "smiling": ("happy", "smile"), "crying": ("cry", "sad"),
    "surprised": ("surprised", "disbelief"), "winking": ("wink", "tongue"), "sleepy": ("closed", "twinkle"),
    "in love": ("hearts", "smile"), "grinning": ("default", "grimace"),
}  # fmt: skip
GARMENTS = {
    "hoodie": "hoodie", "t-shirt": "shirtCrewNeck", "blazer": "blazerAndShirt", "overalls": "overall",
    "sweater": "collarAndSweater", "bear shirt": "graphicShirt",
}  # fmt: skip
EYEWEAR = {"none": "", "glasses": "prescription02", "sunglasses": "wayfarers", "eyepatch": "eyepatch"}
BLACK = (0.12, 0.13, 0.15)

PARTS = ("skin", "garment", "mouth", "eyes", "brows", "hair", "beard", "accessory")


def draw(identity: Values, attributes: Values) -> Drawing:
    part = {name: number for number, name in enumerate(PARTS, 1)}
    eyes, mouth = EXPRESSIONS[attributes["expression"]]
    hair = HAIR[identity["hair colour"]]
    drawing = Drawing()
    drawing.add(avataaars("skin"), part["skin"], SKIN[identity["skin"]])
    drawing.add(avataaars("clothes", GARMENTS[attributes["garment"]]), part["garment"], GARMENT[attributes["garment colour"]])
    drawing.add(avataaars("mouth", mouth), part["mouth"])
    drawing.add(avataaars("nose", "default"), part["skin"])
    drawing.add(avataaars("eyes", eyes), part["eyes"])
    drawing.add(avataaars("eyebrows", BROWS[identity["brows"]]), part["brows"], hair)
    drawing.add(avataaars("top", identity["hair"]), part["hair"], hair)
    if beard := BEARDS[identity["beard"]]:
        drawing.add(avataaars("facialHair", beard), part["beard"], hair)
        if beard.startswith("beard"):  # the mouth shows in front of a beard, else expressions would be hidden
            drawing.add(avataaars("mouth", mouth), part["mouth"])
    if eyewear := EYEWEAR[attributes["accessory"]]:
        drawing.add(avataaars("accessories", eyewear), part["accessory"], BLACK)
    return drawing


def noun(identity: Values, rng: random.Random) -> str:
    """ "a person" half of the time, else by hair and beard "a man", "a woman", ..."""
    if rng.random() < 0.5:
        return rng.choice(("a person", "a person", "someone", "a character"))
    if identity["beard"] != "none" or identity["hair"] in HAIRCUTS["short"]:
        return rng.choice(("a man", "a man", "a guy", "a boy"))
    if identity["hair"] in HAIRCUTS["long"]:
        return rng.choice(("a woman", "a woman", "a lady", "a girl"))
    return rng.choice(("a person", "a man", "a woman"))


SAID = {
    "neutral": ("with a serious face", "looking serious", "with a neutral expression"),
    "smiling": ("smiling", "smiling happily", "with a smile", "looking happy"),
    "crying": ("crying", "in tears", "looking sad", "with a sad face"),
    "surprised": ("surprised", "looking surprised", "with wide open eyes", "shocked"),
    "winking": ("winking", "sticking out the tongue", "making a funny face", "winking with the tongue out"),
    "sleepy": ("sleepy", "with closed eyes", "sleeping", "looking tired"),
    "in love": ("in love", "with heart eyes", "looking in love"),
    "grinning": ("grinning", "showing teeth", "with a big grin"),
}
WORN = {
    "hoodie": ("hoodie", "hooded sweatshirt"), "t-shirt": ("t-shirt", "shirt", "tee"), "blazer": ("blazer", "jacket", "suit jacket"),
    "overalls": ("pair of overalls", "dungaree"), "sweater": ("sweater", "pullover", "jumper"),
    "bear shirt": ("shirt with a bear", "bear shirt", "t-shirt with a bear on it"),
}  # fmt: skip
EYEWEAR_SAID = {
    "glasses": ("glasses", "reading glasses", "eyeglasses"), "sunglasses": ("sunglasses", "dark glasses", "shades"),
    "eyepatch": ("an eyepatch", "an eye patch", "a pirate eyepatch"),
}  # fmt: skip


def phrases(attributes: Values, mentioned: frozenset[str], rng: random.Random) -> list[str]:
    said = []
    if "expression" in mentioned:
        said.append(rng.choice(SAID[attributes["expression"]]))
    worn = []
    if "garment" in mentioned:
        garment = rng.choice(WORN[attributes["garment"]])
        worn.append(article(f"{attributes['garment colour']} {garment}" if "garment colour" in mentioned else garment))
    elif "garment colour" in mentioned:
        said.append(rng.choice(("in {}", "dressed in {}", "wearing {}")).format(attributes["garment colour"]))
    if "accessory" in mentioned and attributes["accessory"] != "none":
        eyewear = rng.choice(EYEWEAR_SAID[attributes["accessory"]])
        if worn and rng.random() < 0.4:
            worn.append(eyewear)
        else:
            said.append(rng.choice(("with {}", "wearing {}")).format(eyewear))
    if worn:
        said.append(rng.choice(("wearing {}", "in {}", "wearing {}")).format(" and ".join(worn)))
    return said


KIND = Kind(
    name="person",
    identity={
        "hair": sum(HAIRCUTS.values(), ()), "hair colour": tuple(HAIR), "skin": tuple(SKIN), "beard": tuple(BEARDS), "brows": tuple(BROWS),
    },
    attributes={
        "expression": tuple(EXPRESSIONS), "garment": tuple(GARMENTS), "garment colour": tuple(GARMENT), "accessory": tuple(EYEWEAR),
    },
    parts=PARTS,
    held_out=frozenset({
        ("hoodie", "purple"), ("t-shirt", "orange"), ("blazer", "green"), ("overalls", "pink"), ("sweater", "black"),
        ("bear shirt", "yellow"), ("crying", "sunglasses"), ("in love", "glasses"), ("grinning", "eyepatch"),
    }),
    draw=draw,
    noun=noun,
    phrases=phrases,
)  # fmt: skip
