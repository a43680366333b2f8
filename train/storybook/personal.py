"""Training samples for an adapter: a picture with `<kind>` in its caption, and a reference of that subject."""

import random
from dataclasses import replace

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from nested_attention.prompts import fill
from train.loop import Batch
from train.objective import Diffusion
from train.pixels import to_tensor
from train.storybook.captions import caption
from train.storybook.dataset import loss_weights, token_mask
from train.storybook.kinds import KINDS
from train.storybook.picture import render
from train.storybook.sampling import Placed, sample_picture, sample_reference
from train.storybook.scenes import CANVAS
from train.storybook.styles import STYLES

ALONE = 0.7  # share of pictures that show nobody else
RESTYLED = 0.4  # share whose style is any of all: a subject is harder to tell in a sketch than in the plain style of most
ELSEWHERE = 0.3  # weight of the loss outside the subject's square


class PersonalPictures(Dataset):
    """Samples for `train.personalizer`. Picture and reference show one identity with nothing else in common.

    In some pictures somebody else stands beside the subject, named by an ordinary word. Captions say nearly all that the
    base can be told. Pixels weigh as in the base's training, and less where the subject does not stand: there an adapter
    has nothing to say. (Within its square no part of it may weigh more than for the base: with hair at three times the
    weight of what is behind it, a face that may have long hair gets long hair.) Noise and weights have the layout of
    the base's latents: `patch` x `patch` pixels in channels. `square`: left, top and side of the subject's, in pixels.
    """

    def __init__(self, kind: str, split: str, tokenizer: CLIPTokenizer, length: int, diffusion: Diffusion, patch: int):
        self.kind, self.split, self.tokenizer, self.length = kind, split, tokenizer, length
        self.diffusion, self.patch = diffusion, patch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"personal/{self.kind}/{self.split}/{index}")
        kinds = [self.kind] if rng.random() < ALONE else rng.sample([self.kind, rng.choice(tuple(KINDS))], 2)
        which = rng.choice([k for k, kind in enumerate(kinds) if kind == self.kind])
        picture = sample_picture(self.split, index, tuple(kinds))
        if rng.random() < RESTYLED:
            picture = replace(picture, style=rng.choice(tuple(STYLES)))
        drawn = render(picture)
        said = caption(drawn.picture, rng, tuple(f"<{self.kind}>" if k == which else None for k in range(len(kinds))), thorough=0.9)
        filled = fill(said.text, {f"<{self.kind}>": self.kind})
        input_ids, columns = token_mask(filled.text, filled.spans[f"<{self.kind}>"], self.tokenizer, 1)
        pixels = to_tensor(drawn.image)
        reference = render(sample_reference(drawn.picture, which, self.split, index)).image
        weights = loss_weights(drawn) * nearby(drawn.picture.subjects[which])
        chance = self.diffusion.draw(index, tuple(pixels.shape))
        return {
            "pixels": pixels, "input_ids": input_ids[None], "columns": columns[0].float(), "reference": to_tensor(reference),
            "weights": self.patches((weights / weights.mean()).expand(3, -1, -1)),
            "level": chance["level"], "noise": self.patches(chance["noise"]), "square": torch.tensor(drawn.picture.subjects[which].square()),
        }  # fmt: skip

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(pixels, self.patch)


def nearby(placed: Placed) -> torch.Tensor:
    """1 in the square that a subject is drawn in, `ELSEWHERE` around it, `(H, W)`."""
    weights = torch.full((CANVAS, CANVAS), ELSEWHERE)
    left, top, side = placed.square()
    weights[top : top + side, max(left, 0) : left + side] = 1.0
    return weights
