"""From maps to something to look at. Numbers come from `tracing`; here they only get colours."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nested_attention.errors import NestedAttentionError
from nested_attention.tracing import Grid, SubjectMaps
from nested_attention.ui.session import Result

SHOWN = 512  # side in pixels of the longer edge of explanatory pictures


def enlarged(image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The picture with `SHOWN` pixels along its longer edge."""
    scale = SHOWN / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)


def heat(image: Image.Image, share: Tensor) -> Image.Image:
    """`share (h, w)` in 0..1 over the picture: the brighter, the more; the scale ends at the largest share."""
    base = np.asarray(enlarged(image), np.float32)
    top = max(float(share.max()), 1e-6)
    scaled = cv2.resize((share / top).float().cpu().numpy(), (base.shape[1], base.shape[0]), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1].astype(np.float32)
    return Image.fromarray((0.35 * base + 0.65 * colours).clip(0, 255).astype(np.uint8))


def regions(
    image: Image.Image, maps: SubjectMaps, which: int, resolution: Grid | None, third: int | None, count: int = 6
) -> tuple[Image.Image, list[tuple[np.ndarray, str]]]:
    """Where which nested token answers most, inside the subject: the picture and masks with labels.

    Tokens are ordered by how much of the picture they answer for (outer times nested share, summed).
    """
    nested, outer = maps.nested(resolution, third)[which], maps.outer(resolution or "mean", third)[which]
    mass = (nested * outer[..., None]).sum((0, 1))
    strongest = mass.topk(min(count, len(mass))).indices.tolist()
    inside = outer > 0.35 * outer.max()
    winner = nested.argmax(-1)
    shown = enlarged(image)
    masks = []
    for token in strongest:
        mask = ((winner == token) & inside).float().cpu().numpy()
        mask = cv2.resize(mask, shown.size, interpolation=cv2.INTER_NEAREST)
        masks.append((mask, f"token {token}: {mass[token] / mass.sum():.0%}"))
    return shown, masks


def value_picture(maps: SubjectMaps, which: int, resolution: Grid, third: int | None) -> tuple[Image.Image, Image.Image]:
    """V_q[s] as colours (its three main components), and the one colour that the ordinary word has everywhere."""
    values, word = maps.values(resolution, third)
    flat = values[which].flatten(0, 1)
    mean = flat.mean(0)
    _, _, axes = torch.linalg.svd((flat - mean).float(), full_matrices=False)
    both = (torch.cat([flat, word[None]]) - mean) @ axes[:3].T  # (HW + 1, 3)
    low, high = both[:-1].quantile(0.02, 0), both[:-1].quantile(0.98, 0)
    colours = (((both - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) * 255).byte().cpu().numpy()
    picture = Image.fromarray(colours[:-1].reshape(*resolution, 3))
    plain = Image.fromarray(np.broadcast_to(colours[-1], (*resolution, 3)).copy())
    return enlarged(picture, Image.Resampling.NEAREST), enlarged(plain, Image.Resampling.NEAREST)


@dataclass(frozen=True)
class PointReport:
    """What was routed to one point of a picture.

    Attributes:
        words: share of the attention there, by subject and for all other words together; sums to 1.
        tokens: the subject's tokens that answer there and their shares, strongest first.
        patches: share of every patch of the reference pictures, `(P,)`; sums to 1.
    """

    words: dict[str, float]
    tokens: list[tuple[int, float]]
    patches: Tensor


def explain_point(
    result: Result, placeholder: str, which: float | None, x: float | None, y: float | None, resolution: Grid | None = None,
    third: int | None = None, count: int = 5,
) -> PointReport:  # fmt: skip
    """Explains the point `(x, y)`, fractions of width and height, of picture `which`, at what `SubjectMaps` calls resolution and third.

    Raises:
        NestedAttentionError: the subject or the picture is not part of the result, or the point lies outside.
    """
    if which is None or which not in range(len(result.files)):
        raise NestedAttentionError(f"picture {which} does not exist; the last generation has {len(result.files)}, counted from 0.")
    if x is None or y is None or not (0 <= x < 1 and 0 <= y < 1):
        raise NestedAttentionError(f"the point ({x}, {y}) lies outside the picture; give fractions of width and height from 0 to 1.")
    maps, picture = result.maps_of(placeholder), int(which)
    shares = {s.placeholder: result.maps_of(s.placeholder).outer(resolution or "mean", third)[picture] for s in result.subjects}
    height, width = shares[placeholder].shape
    cell = int(y * height), int(x * width)
    words = {name: float(share[cell]) for name, share in shares.items()}
    words["all other words"] = max(0.0, 1.0 - sum(words.values()))
    nested = maps.nested(resolution, third)[picture][cell]
    top = nested.topk(min(count, len(nested)))
    tokens = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return PointReport(words, tokens, maps.lens(resolution, third)[picture][cell])


def reference_heat(result: Result, placeholder: str, patches: Tensor) -> list[Image.Image]:
    """The reference pictures of a subject with the share of every patch as heat."""
    subject = result.maps_of(placeholder).subject
    out, start = [], 0
    for image in subject.images:
        count = image.reading.shape[1]
        side = round(count**0.5)
        out.append(heat(image.picture, patches[start : start + count].reshape(side, side)))
        start += count
    return out
