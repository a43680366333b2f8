"""Vehicles (Fluent emoji): model, paint and emblem stay; the load on the roof changes."""

import random

import cv2
import numpy as np

from train.storybook.artwork import emoji, painted_emoji
from train.storybook.kinds.base import Kind, Values
from train.storybook.layers import NATIVE, Drawing, Layer
from train.storybook.palette import PAINT

# model -> emoji, hue range of its paint in degrees, centre of the emblem and top of the roof as fractions of the side
MODELS: dict[str, tuple[str, tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "car": ("automobile", (335, 20), (0.50, 0.62), (0.55, 0.24)),
    "suv": ("sport-utility-vehicle", (205, 260), (0.58, 0.60), (0.58, 0.14)),
    "bus": ("bus", (15, 50), (0.60, 0.64), (0.50, 0.17)),
    "pickup": ("pickup-truck", (335, 20), (0.50, 0.58), (0.36, 0.26)),
    "delivery truck": ("delivery-truck", (25, 60), (0.68, 0.42), (0.68, 0.14)),
    "fire engine": ("fire-engine", (330, 20), (0.70, 0.58), (0.70, 0.28)),
    "ambulance": ("ambulance", (325, 15), (0.30, 0.62), (0.68, 0.18)),
    "tractor": ("tractor", (90, 170), (0.40, 0.55), (0.65, 0.12)),
    "race car": ("racing-car", (335, 22), (0.55, 0.60), (0.72, 0.42)),
    "scooter": ("motor-scooter", (320, 15), (0.72, 0.62), (0.70, 0.40)),
    "motorcycle": ("motorcycle", (325, 15), (0.52, 0.62), (0.70, 0.34)),
    "train": ("locomotive", (320, 12), (0.75, 0.55), (0.75, 0.20)),
}
LOADS = {
    "none": "",
    "gift": "wrapped-gift",
    "suitcase": "luggage",
    "plant": "potted-plant",
    "teddy bear": "teddy-bear",
    "balloon": "balloon",
}
EMBLEMS = ("none", "star", "heart", "disc", "bolt")
PARTS = ("body", "emblem", "load")
FLOOR = 0.82  # the vehicle is drawn at this scale, so that a load fits above it


def placed(rgba: np.ndarray, centre: tuple[float, float], bottom: bool = False) -> Layer:
    """A premultiplied square picture as a layer around `centre` (or standing on it), in fractions of the side."""
    side = rgba.shape[0]
    left = int(np.clip(round(centre[0] * NATIVE - side / 2), 0, NATIVE - side))
    top = int(np.clip(round(centre[1] * NATIVE - side / (1 if bottom else 2)), 0, NATIVE - side))
    base, alpha = np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3:])
    return Layer(base, alpha, np.zeros_like(alpha), top, left)


def emblem(name: str) -> np.ndarray:
    """A white sign on a dark badge as premultiplied RGBA, drawn eight times too large and averaged down."""
    side, scale = 30, 8
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    turn = np.linspace(0, 2 * np.pi, 80)
    outline = {
        "star": np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None],
        "heart": np.stack(
            [np.sin(turn) ** 3, -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16], 1
        ),
        "disc": np.stack([np.cos(turn), np.sin(turn)], 1) * 0.8,
        "bolt": np.array([(0.25, -1), (-0.65, 0.15), (-0.1, 0.15), (-0.3, 1), (0.65, -0.25), (0.1, -0.25)]),
    }[name]
    badge = np.zeros((side * scale, side * scale, 4), np.uint8)
    cv2.circle(badge, (side * scale // 2, side * scale // 2), side * scale // 2 - 1, (38, 42, 74, 255), -1)
    cv2.fillPoly(badge, [((outline * 0.66 + 1) * side * scale / 2).astype(np.int32)], (255, 255, 255, 255))
    return cv2.resize(badge, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def draw(identity: Values, attributes: Values) -> Drawing:
    name, hues, sign, roof = MODELS[identity["model"]]
    full = Drawing()
    full.add(painted_emoji(name, hues), 1, PAINT[identity["paint"]])
    side = round(NATIVE * FLOOR)
    rgba, parts = full.resized(side)
    left, top = (NATIVE - side) // 2, NATIVE - side
    drawing = Drawing()
    drawing.rgba[top:, left : left + side], drawing.parts[top:, left : left + side] = rgba, parts

    def spot(point: tuple[float, float]) -> tuple[float, float]:
        return (left + point[0] * side) / NATIVE, (top + point[1] * side) / NATIVE

    if identity["emblem"] != "none":
        drawing.add(placed(emblem(identity["emblem"]), spot(sign)), 2)
    if load := LOADS[attributes["accessory"]]:
        drawing.add(placed(emoji(load, 50), spot((roof[0], roof[1] + 0.06)), bottom=True), 3)
    return drawing


def noun(identity: Values, rng: random.Random) -> str:
    """ "a vehicle" mostly; its model is part of its identity and only sometimes said."""
    return "a vehicle" if rng.random() < 0.7 else f"{'an' if identity['model'] in ('suv', 'ambulance') else 'a'} {identity['model']}"


def phrases(attributes: Values, mentioned: frozenset[str], rng: random.Random) -> list[str]:
    if "accessory" not in mentioned or attributes["accessory"] == "none":
        return []
    return [rng.choice(("with a {} on top", "carrying a {}", "with a {} on the roof", "with a {}")).format(attributes["accessory"])]


KIND = Kind(
    name="vehicle",
    identity={"model": tuple(MODELS), "paint": tuple(PAINT), "emblem": EMBLEMS},
    attributes={"accessory": tuple(LOADS)},
    parts=PARTS,
    held_out=frozenset(),
    draw=draw,
    noun=noun,
    phrases=phrases,
)
