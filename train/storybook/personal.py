"""Training samples for an adapter: a picture with `<kind>` in its caption, and a reference of that subject."""

import random

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from nested_attention.prompts import fill
from train.loop import Batch
from train.objective import Diffusion
from train.storybook.captions import caption
from train.storybook.dataset import loss_weights, part_weights, to_tensor, token_mask
from train.storybook.kinds import KINDS
from train.storybook.picture import render
from train.storybook.sampling import sample_picture, sample_reference

LASTING = {  # and faces, so that they keep what the prompt says of them
    "skin": 2.0, "hair": 3.0, "beard": 4.0, "brows": 6.0, "body": 2.0, "pattern": 4.0, "emblem": 6.0, "eyes": 3.0, "mouth": 3.0,
}  # fmt: skip
ALONE = 0.7  # share of pictures that show nobody else


class PersonalPictures(Dataset):
    """Samples for `train.personalizer`. Picture and reference show one identity with nothing else in common.

    In some pictures somebody else stands beside the subject, named by an ordinary word. Captions say nearly all that the
    base can be told, and pixels of what lasts of the subject (`LASTING`) weigh more, since only there has an adapter
    something to say. Noise and weights have the layout of the base's latents: `patch` x `patch` pixels in channels.
    """

    def __init__(self, kind: str, split: str, tokenizer: CLIPTokenizer, length: int, diffusion: Diffusion, patch: int):
        self.kind, self.split, self.tokenizer, self.length = kind, split, tokenizer, length
        self.diffusion, self.patch, self.weights = diffusion, patch, part_weights(LASTING)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"personal/{self.kind}/{self.split}/{index}")
        kinds = [self.kind] if rng.random() < ALONE else rng.sample([self.kind, rng.choice(tuple(KINDS))], 2)
        which = rng.choice([k for k, kind in enumerate(kinds) if kind == self.kind])
        drawn = render(sample_picture(self.split, index, tuple(kinds)))
        said = caption(drawn.picture, rng, tuple(f"<{self.kind}>" if k == which else None for k in range(len(kinds))), thorough=0.9)
        filled = fill(said.text, {f"<{self.kind}>": self.kind})
        input_ids, columns = token_mask(filled.text, filled.spans[f"<{self.kind}>"], self.tokenizer, 1)
        pixels = to_tensor(drawn.image)
        reference = render(sample_reference(drawn.picture, which, self.split, index)).image
        chance = self.diffusion.draw(index, tuple(pixels.shape))
        return {
            "pixels": pixels, "input_ids": input_ids[None], "columns": columns[0].float(), "reference": to_tensor(reference),
            "weights": self.patches(loss_weights(drawn, self.weights, which).expand(3, -1, -1)),
            "level": chance["level"], "noise": self.patches(chance["noise"]),
        }  # fmt: skip

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(pixels, self.patch)
