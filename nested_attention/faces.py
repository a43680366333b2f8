"""Finding the subject in a photo and framing it as adapters for photos expect.

The released weights know faces aligned as in FFHQ: eyes level, at one height and size in a square. Where insightface's
models are, five points give exactly that. Otherwise OpenCV's cascades find frontal faces of people
and cats, and a margin imitates the framing. Otherwise the whole picture is used. Which of these it was is always said.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from nested_attention.errors import NestedAttentionError
from nested_attention.images import edge_colour

FRAME = 512  # side of an aligned picture in pixels
Box = tuple[float, float, float, float]
Method = Literal["insightface", "opencv", "crop", "whole"]
SAID: dict[Method, str] = {
    "insightface": "face found and aligned by insightface (its models are for non-commercial research)",
    "opencv": "face found by OpenCV's cascade, framed with a margin",
    "crop": "your own crop",
    "whole": "the whole picture, nothing cut off",
}
MARGIN = 1.9  # side of the frame relative to a cascade's box: FFHQ frames show hair and chin


@dataclass(frozen=True)
class Face:
    """A face in a picture.

    Attributes:
        box: left, top, right, bottom in pixels.
        quad: corners of the frame in pixels, `(4, 2)`: top left, bottom left, bottom right, top right.
        method: what found it.
    """

    box: Box
    quad: np.ndarray
    method: Method

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def find_faces(image: Image.Image, kind: str) -> list[Face]:
    """The faces of people, cats or pets in an RGB picture, the largest first; empty for other kinds and where there is none.

    Of pets only cats' faces can be found, no dog's. Nothing is fetched: `insightface_analysis` does that once, when asked to.

    Raises:
        NestedAttentionError: insightface's models are there, but damaged.
    """
    if kind not in SEARCHES:
        return []
    faces = insightface_faces(image) if kind == "person" and insightface_ready() else cascade_faces(image, kind)
    return sorted(faces, key=lambda face: -face.area)


def framed(image: Image.Image, face: Face, size: int = FRAME) -> Image.Image:
    """The face's frame, upright, as a square of `size` pixels; the picture's edge colour around it where the frame leaves it."""
    target = np.array([(0, 0), (0, size), (size, size)], np.float32)
    matrix = cv2.getAffineTransform(face.quad[:3].astype(np.float32), target)
    shrink = size / float(np.linalg.norm(face.quad[1] - face.quad[0]))
    pixels = np.asarray(image)
    if shrink < 0.5:  # average before sampling, else small details alias
        pixels = cv2.GaussianBlur(pixels, (0, 0), 0.4 / shrink)
    out = cv2.warpAffine(pixels, matrix, (size, size), flags=cv2.INTER_CUBIC, borderValue=edge_colour(pixels))
    return Image.fromarray(out)


def cropped(image: Image.Image, box: Box) -> Image.Image:
    """The user's own crop, `box` in fractions of width and height.

    Raises:
        NestedAttentionError: the box is empty or lies outside.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise NestedAttentionError(f"the crop {box} is empty or lies outside; give left, top, right, bottom as fractions from 0 to 1.")
    width, height = image.size
    return image.crop((round(left * width), round(top * height), max(round(right * width), 1), max(round(bottom * height), 1)))


CHOICES = re.compile(r"whole|crop|face( [2-9]| [1-9][0-9])?")  # of `frame`


@dataclass(frozen=True)
class Framed:
    """A picture as an adapter gets to see it, and what was done to it, in words. `faces`: how many could be chosen."""

    image: Image.Image
    said: str
    faces: int


def frame(
    image: Image.Image, kind: str, choice: str = "face", crop: Box = (0.0, 0.0, 1.0, 1.0),
    find: Callable[[Image.Image, str], list[Face]] = find_faces,
) -> Framed:  # fmt: skip
    """Frames the subject of an RGB picture.

    Args:
        choice: "whole"; "crop" for the user's own `crop`; "face" for the largest face, "face 2" for the next, and so on.
            Where no such face is found the whole picture is used, and `said` tells.
        find: what looks for faces, for instance one that remembers them.

    Raises:
        NestedAttentionError: there is no such choice; the crop is empty or lies outside; insightface's models are damaged.
    """
    if not CHOICES.fullmatch(choice):
        raise NestedAttentionError(f'{choice!r} is no framing; choose "whole", "crop", "face", "face 2" and so on.')
    if choice == "whole":
        return Framed(image, SAID["whole"], 0)
    if choice == "crop":
        return Framed(cropped(image, crop), SAID["crop"], 0)
    faces = find(image, kind)
    which = int(choice.removeprefix("face") or 1) - 1
    if which >= len(faces):
        found = f"only {len(faces)} found" if faces else "no face was found"
        return Framed(image, f"{found}: {SAID['whole']}; crop it yourself if the subject is small", len(faces))
    of = f", face {which + 1} of {len(faces)} by size" if len(faces) > 1 else ""
    return Framed(framed(image, faces[which]), SAID[faces[which].method] + of, len(faces))


# ------------------------------------------------------------------------------------------------------ insightface


PACKAGES = "insightface", "onnxruntime"


def insightface_folder() -> Path:
    return Path(os.environ.get("INSIGHTFACE_HOME", Path.home() / ".insightface")) / "models/buffalo_l"


def insightface_ready() -> bool:
    """True if insightface is installed and its detector lies on this machine, so that nothing has to be fetched."""
    return all(map(find_spec, PACKAGES)) and any(insightface_folder().glob("det_*.onnx"))


@cache
def insightface_analysis() -> Any:
    """insightface's detector. Its models are fetched if they are not there.

    Raises:
        NestedAttentionError: they cannot be fetched, or are damaged; or the package is missing.
    """
    try:
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise NestedAttentionError(
            f"insightface cannot be used ({error}); install it with `pip install {' '.join(PACKAGES)}`, or choose another way to frame the face."
        ) from error
    try:
        analysis = FaceAnalysis("buffalo_l", root=str(insightface_folder().parents[1]), allowed_modules=["detection"])
        analysis.prepare(ctx_id=0, det_size=(640, 640))
    except Exception as error:  # the package raises whatever its downloader and onnxruntime raise
        if insightface_ready():
            raise NestedAttentionError(
                f"insightface's models are damaged ({error}); delete {insightface_folder()}, or choose another way to frame the face."
            ) from error
        shutil.rmtree(insightface_folder(), ignore_errors=True)  # where there is such a folder, the package fetches nothing any more
        raise NestedAttentionError(
            f"insightface's models cannot be had ({error}); connect to the internet, or choose another way to frame the face."
        ) from error
    return analysis


def insightface_faces(image: Image.Image) -> list[Face]:
    """Faces with five points.

    Raises:
        NestedAttentionError: see `insightface_analysis`.
    """
    found = insightface_analysis().get(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
    out = []
    for face in found:
        left, top, right, bottom = map(float, face.bbox)
        out.append(Face((left, top, right, bottom), ffhq_quad(np.asarray(face.kps, np.float64)), "insightface"))
    return out


def ffhq_quad(points: np.ndarray) -> np.ndarray:
    """The frame of FFHQ (Karras et al. 2019, appendix A) from eyes, nose and corners of the mouth, `(5, 2)`."""
    left_eye, right_eye, _, left_mouth, right_mouth = points
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    across, down = right_eye - left_eye, mouth - eyes
    x = across - np.array([-down[1], down[0]])
    x *= max(np.hypot(*across) * 2.0, np.hypot(*down) * 1.8) / np.hypot(*x)
    y = np.array([-x[1], x[0]])
    centre = eyes + down * 0.1
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


# ----------------------------------------------------------------------------------------------------------- OpenCV


@dataclass(frozen=True)
class Search:
    """How OpenCV looks for the faces of a kind.

    A cascade answers yes many times around a true face, and in the mirror image too; around a false one it does so a few
    times. So the raw answers of both are counted as votes.

    Attributes:
        cascade: file of OpenCV's package.
        side: the picture's longer side is shrunk to this before looking; fine texture misleads the cat's cascade.
        smallest: side of the smallest face relative to the picture's shorter side.
        enough: votes that a picture's clearest face needs.
        sure: with so many votes for a face, no other turn of the picture is tried.
    """

    cascade: str
    side: int
    smallest: float
    enough: int
    sure: int


CAT = Search("haarcascade_frontalcatface_extended.xml", 256, 0.2, 10, 40)
SEARCHES = {"person": Search("haarcascade_frontalface_alt2.xml", 768, 0.06, 30, 30), "cat": CAT, "pet": CAT}
TURNS = (0, -12, 12, 90, -90, 180, 78, 102, -78, -102, 168, -168)  # degrees
ALSO = 0.05  # further faces need this share of the best one's votes


def cascade_faces(image: Image.Image, kind: str) -> list[Face]:
    """Frontal faces by OpenCV's cascades, at whichever turn of the picture they are clearest."""
    search, grey = SEARCHES[kind], np.asarray(image.convert("L"))
    scale = min(1.0, search.side / max(grey.shape))
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    # one for every search: it keeps a state, which two threads must not share
    cascade = cv2.CascadeClassifier(cv2.data.haarcascades + search.cascade)  # type: ignore[attr-defined]
    best, faces = 0, []
    for turn in TURNS:
        turned, back = rotated(small, turn)
        found = votes(turned, search, cascade)
        if found and found[0][0] > best:
            best = found[0][0]
            faces = [turned_face(box, back, scale) for count, box in found if count >= ALSO * best]
        if best >= search.sure:
            break
    return faces if best >= search.enough else []


def votes(grey: np.ndarray, search: Search, cascade: cv2.CascadeClassifier) -> list[tuple[int, np.ndarray]]:
    """`(votes, box)` of all candidates, most votes first; `box` is x, y, width, height."""
    side = max(20, int(min(grey.shape) * search.smallest))
    boxes = [tuple(box) for box in cascade.detectMultiScale(grey, 1.05, 0, minSize=(side, side))]
    mirrored = cascade.detectMultiScale(np.ascontiguousarray(grey[:, ::-1]), 1.05, 0, minSize=(side, side))
    boxes += [(grey.shape[1] - x - width, y, width, height) for x, y, width, height in mirrored]
    grouped, counts = cv2.groupRectangles([tuple(map(int, box)) for box in boxes], 1, 0.25)
    return sorted(zip(map(int, np.ravel(counts)), map(np.asarray, grouped), strict=True), key=lambda vote: -vote[0])


def rotated(grey: np.ndarray, degrees: float) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """`grey` turned by `degrees` with nothing cut off, and how to bring points `(n, 2)` back."""
    height, width = grey.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    cos, sin = abs(matrix[0, 0]), abs(matrix[0, 1])
    size = round(height * sin + width * cos), round(height * cos + width * sin)
    matrix[:, 2] += (size[0] - width) / 2, (size[1] - height) / 2
    inverse = cv2.invertAffineTransform(matrix)
    turned = cv2.warpAffine(grey, matrix, size, borderMode=cv2.BORDER_REPLICATE)
    return turned, lambda points: points @ inverse[:, :2].T + inverse[:, 2]


def turned_face(box: np.ndarray, back: Callable[[np.ndarray], np.ndarray], scale: float) -> Face:
    """A cascade's box in the turned picture as a face in the original."""
    x, y, width, height = (float(value) for value in box)
    centre, half = np.array([x + width / 2, y + height * 0.48]), MARGIN * width / 2
    corners = centre + half * np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)])
    inner = back(np.array([(x, y), (x + width, y), (x, y + height), (x + width, y + height)])) / scale
    return Face((*inner.min(0), *inner.max(0)), back(corners) / scale, "opencv")
