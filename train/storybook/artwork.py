"""Where the artwork comes from, as `Layer`s at `NATIVE` size. Every function is cached: a part is rasterized once.

Sources and licences are listed in ATTRIBUTION.md: avataaars (package `dicebear-styles`), David Revoy's cats (package
`robohash`), Microsoft Fluent emoji (files in `assets/storybook/artwork/fluent`).
"""

import io
import json
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import cv2
import numpy as np
import resvg_py
from PIL import Image

from train.storybook.layers import NATIVE, Layer

SVG = 'xmlns="http://www.w3.org/2000/svg"'
FLUENT = Path(__file__).parents[2] / "assets/storybook/artwork/fluent"


def rasterize(svg: str, size: int) -> np.ndarray:
    """An SVG text as straight-alpha RGBA `(size, size, 4)` float32 in 0..1."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.float32) / 255


def premultiplied(rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Straight RGBA -> (rgb times alpha, alpha)."""
    return rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]


# --------------------------------------------------------------------------------------------- avataaars (people)


@cache
def _avataaars() -> dict:
    path = Path(str(distribution("dicebear-styles").locate_file("dicebear_styles/avataaars.json")))
    return json.loads(path.read_text())


def _svg(element: dict, variant: dict[str, str], colour: str) -> str:
    """One element of the style's JSON as SVG text, every colour slot filled with `colour`."""
    attributes = "".join(f' {key}="{colour if isinstance(value, dict) else value}"' for key, value in element.get("attributes", {}).items())
    if element["type"] == "component":
        chosen = variant.get(element["name"])
        children = _avataaars()["components"][element["name"]]["variants"][chosen]["elements"] if chosen else []
        return f"<g{attributes}>{''.join(_svg(child, variant, colour) for child in children)}</g>"
    children = element.get("children", [])
    inner = "".join(_svg(child, variant, colour) for child in children)
    return f"<{element['name']}{attributes}>{inner}</{element['name']}>"


@cache
def avataaars(component: str, variant: str = "") -> Layer:
    """A part of an avataaars person: `component` "skin" is head and neck, others as the style names them.

    The part is drawn once with its colour slot black and once white; the difference is the tint.
    """

    def drawn(colour: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = {component: variant, "clothesGraphic": "bear"}
        body = "".join(
            _svg(element, chosen, colour)
            for element in _avataaars()["canvas"]["elements"]
            if (element["type"] == "component") == (component != "skin") and (component == "skin" or element["name"] == component)
        )
        return premultiplied(rasterize(f'<svg {SVG} viewBox="0 0 280 280" fill="none">{body}</svg>', NATIVE))

    (black, alpha), (white, _) = drawn("#000000"), drawn("#ffffff")
    return Layer.crop(black, alpha, (white - black).mean(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------ robohash (cats)


@cache
def cat(folder: str, name: str, tinted: bool = False) -> Layer:
    """A part of a cat, e.g. `cat("000#00body", "body3", tinted=True)`.

    A tinted part keeps its shading relative to its own median brightness, and takes its hue from the colour.
    """
    root = Path(str(distribution("robohash").locate_file("robohash/sets/set4"))) / folder
    path = next(path for path in root.iterdir() if path.stem.split("#")[1] == name)
    image = Image.open(path).convert("RGBa").resize((NATIVE, NATIVE), Image.Resampling.BOX)  # RGBa: premultiplied
    rgba = np.asarray(image, np.float32) / 255
    base, alpha = rgba[..., :3], rgba[..., 3:]
    if not tinted:
        return Layer.crop(base, alpha, np.zeros_like(alpha))
    brightness = base.mean(-1, keepdims=True)
    typical = float(np.median((brightness / np.maximum(alpha, 1e-3))[alpha[..., 0] > 0.9 * alpha.max()]))
    tint = np.minimum(brightness / typical, 1.15 * alpha) if typical > 0.05 else alpha  # a black part has no shading
    return Layer.crop(np.zeros_like(base), alpha, tint)


# --------------------------------------------------------------------------------- fluent emoji (vehicles, props)


@cache
def emoji(name: str, size: int = NATIVE) -> np.ndarray:
    """A fluent emoji as premultiplied RGBA `(size, size, 4)`."""
    image = Image.open(FLUENT / f"{name}.webp").convert("RGBa").resize((size, size), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


@cache
def painted_emoji(name: str, hues: tuple[float, float]) -> Layer:
    """A fluent emoji whose saturated pixels with a hue in `hues` (degrees, may wrap) are its paint, to be tinted."""
    rgba = emoji(name)
    base, alpha = rgba[..., :3], rgba[..., 3:]
    hue, lightness, saturation = np.moveaxis(cv2.cvtColor(base / np.maximum(alpha, 1e-3), cv2.COLOR_RGB2HLS), -1, 0)
    low, high = hues
    inside = (hue >= low) & (hue <= high) if low <= high else (hue >= low) | (hue <= high)
    paint = (inside & (saturation > 0.3) & (lightness > 0.12) & (alpha[..., 0] > 0.1)).astype(np.float32)
    paint = cv2.GaussianBlur(paint, (0, 0), 0.6)[..., None]
    value = base.max(-1, keepdims=True)
    tint = value / max(float(np.median(value[paint[..., 0] > 0.9])), 1e-3)
    return Layer.crop(base * (1 - paint), alpha, np.minimum(tint, 1.15) * paint * alpha)
