"""Feeding a training with photos: samples by index, each brought to the size of its bucket."""

import math
import random

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from nested_attention.encoder import ImageConfig
from nested_attention.encoding import image_pixels
from nested_attention.errors import NestedAttentionError
from nested_attention.images import padded_square
from train.loop import Batch
from train.photos.order import Shuffled
from train.photos.sample import Source
from train.pixels import to_tensor

Size = tuple[int, int]  # height, width
LONGEST = 2.0  # longer side of a bucket relative to the shorter one
LEAST = 0.85  # of resolution ** 2 pixels that a bucket has


def buckets(resolution: int, multiple: int = 64) -> list[Size]:
    """Heights and widths in multiples of `multiple`, from 1:2 to 2:1, with 85 to 100 % of `resolution ** 2` pixels.

    Raises:
        NestedAttentionError: the resolution is not a multiple of `multiple`.
    """
    if resolution < 1 or resolution % multiple:
        raise NestedAttentionError(f"the resolution {resolution} is not a multiple of {multiple}; choose one, such as {8 * multiple}.")
    found = set()
    for short in range(multiple, resolution + 1, multiple):
        long = min(int(LONGEST * short), resolution**2 // short) // multiple * multiple
        if short * long >= LEAST * resolution**2:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest(size: Size, sizes: list[Size]) -> int:
    """The number of the bucket whose shape is nearest to `size`, so that least is cut off."""
    shape = math.log(size[0] / size[1])
    return min(range(len(sizes)), key=lambda k: abs(math.log(sizes[k][0] / sizes[k][1]) - shape))


def fitted(image: Image.Image, target: Size, rng: random.Random) -> tuple[Image.Image, tuple[int, int]]:
    """`image` scaled until it covers `target`, a random part of that size, and the part's top and left in scaled pixels."""
    height, width = target
    scale = max(height / image.height, width / image.width)
    scaled = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.LANCZOS)
    top, left = rng.randint(0, scaled.height - height), rng.randint(0, scaled.width - width)
    return scaled.crop((left, top, left + width, top + height)), (top, left)


class PhotoDataset(Dataset):
    """Photos as a training wants them. Item `i` is sample `i` of a run: it goes on beyond the first epoch.

    An item holds `pixels (3, H, W)` in -1..1, `reference (3, S, S)` as the image encoder wants it, and for SDXL three
    pairs of int64: `size`, the photo's own height and width; `crop`, top and left of the part that is seen, in pixels
    after scaling; `target`, H and W.
    """

    def __init__(self, source: Source, resolution: int, image: ImageConfig, seed: int = 0):
        self.source, self.image, self.seed = source, image, seed
        self.order = Shuffled(source, seed)
        self.buckets = buckets(resolution)
        self.bucket_numbers = np.array([nearest(source.size(photo), self.buckets) for photo in range(len(source))])

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.source)

    def caption(self, index: int) -> str:
        """The caption of item `index`, with its placeholder."""
        return self.source.caption(self.order[index])

    def __getitem__(self, index: int) -> Batch:
        number = self.order[index]
        photo, target = self.source[number], self.buckets[self.bucket_numbers[number]]
        seen, corner = fitted(photo.image, target, random.Random(f"crop/{self.seed}/{index}"))
        return {
            "pixels": to_tensor(np.array(seen)),
            "reference": image_pixels(padded_square(photo.reference, self.image.size), self.image)[0],
            "size": torch.tensor((photo.image.height, photo.image.width)),
            "crop": torch.tensor(corner), "target": torch.tensor(target),
        }  # fmt: skip
