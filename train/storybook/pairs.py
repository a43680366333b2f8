"""Two pictures of one identity, for whatever learns to recognize it: the image encoder and the judge."""

import random

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from train.pixels import to_tensor
from train.storybook.labels import View, answers, view
from train.storybook.picture import SLOT, Render, render
from train.storybook.sampling import sample_picture, sample_reference


class Pairs(Dataset):
    """Item `i`: a view of one subject of picture `i` and a reference of the same identity, with answers, and the reference's parts.

    `blurred`: weaken one picture in two as a generator might (blur, noise), so that a judge of generated pictures has
    seen such; the drawing itself stays a render.
    """

    def __init__(self, split: str, length: int, blurred: bool):
        self.split, self.length, self.blurred = split, length, blurred

    def __len__(self) -> int:
        return self.length

    def drawn(self, index: int) -> tuple[View, View, Render]:
        rng = random.Random(f"pair/{self.split}/{index}")
        target = render(sample_picture(self.split, index))
        count = len(target.picture.subjects)
        which = rng.randrange(count)
        reference = render(sample_reference(target.picture, which, self.split, index))
        whole = count > 1 and rng.random() < 0.15  # the whole of a pair asks for scene and style only
        shown = None if whole else which
        first = View(view(target.image, shown, count), answers(target.picture, shown))
        return first, View(reference.image, answers(reference.picture, 0)), reference

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, second, reference = self.drawn(index)
        noise = np.random.default_rng(index)
        images = [weakened(x.image, noise) if self.blurred and noise.random() < 0.5 else x.image for x in (first, second)]
        return {
            "images": torch.stack([to_tensor(image) for image in images]),
            "answers": torch.from_numpy(np.stack([first.answers, second.answers])),
            "parts": torch.from_numpy((reference.parts % SLOT).astype(np.int64)),
        }


def weakened(image: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """A little blur, noise and shift of brightness."""
    soft = cv2.GaussianBlur(image, (0, 0), float(noise.uniform(0.3, 1.3))).astype(np.float32)
    noisy = soft * noise.uniform(0.92, 1.08) + noise.normal(0, noise.uniform(0, 8), image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)
