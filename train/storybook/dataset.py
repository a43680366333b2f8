"""Feeding a training: samples by index, each with its own noise, so that a run can stop and go on anywhere."""

import random
from functools import cache

import torch
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from nested_attention.prompts import last_token
from train.objective import Diffusion
from train.pixels import to_tensor
from train.storybook.captions import Caption, caption
from train.storybook.kinds import KINDS
from train.storybook.picture import SLOT, Render, render
from train.storybook.sampling import sample_picture

DETAILS = {  # weight of a pixel in the loss by its part: small parts count for more than their area
    "eyes": 5.0, "mouth": 5.0, "brows": 3.0, "beard": 2.0, "accessory": 3.0, "emblem": 3.0, "load": 2.0,
    "garment": 2.0, "marking": 1.5, "hair": 1.5,
}  # fmt: skip


def token_mask(
    text: str, spans: tuple[tuple[int, int], ...], tokenizer: CLIPTokenizer, subjects: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `(L,)` of `text`, and for each subject which of them name it: `(subjects, L)` bool.

    Only the last token of a noun phrase names the subject ("a delivery truck" -> "truck").
    """
    encoded = tokenizer(text, padding="max_length", truncation=True, return_offsets_mapping=True)
    mask = torch.zeros(subjects, tokenizer.model_max_length, dtype=torch.bool)
    for subject, (start, end) in enumerate(spans):
        mask[subject, last_token(encoded["offset_mapping"], start, end)] = True
    return torch.tensor(encoded["input_ids"]), mask


class Pictures(Dataset):
    """Pictures with captions for the base model. Item `i`: pixels, token ids, names, masks, loss weights, noise."""

    def __init__(self, split: str, tokenizer: CLIPTokenizer, length: int, diffusion: Diffusion):
        self.split, self.tokenizer, self.length, self.diffusion = split, tokenizer, length, diffusion

    def __len__(self) -> int:
        return self.length

    def described(self, index: int) -> tuple[Render, Caption]:
        drawn = render(sample_picture(self.split, index))
        return drawn, caption(drawn.picture, random.Random(f"caption/{self.split}/{index}"))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn, said = self.described(index)
        input_ids, names = token_mask(said.text, said.nouns, self.tokenizer)
        pixels = to_tensor(drawn.image)
        masks = torch.zeros(2, *drawn.parts.shape)
        for which in range(len(drawn.picture.subjects)):
            masks[which] = torch.from_numpy(drawn.subject_mask(which))
        return {
            "pixels": pixels, "input_ids": input_ids, "names": names, "masks": masks,
            "weights": loss_weights(drawn), **self.diffusion.draw(index, tuple(pixels.shape)),
        }  # fmt: skip


@cache
def weight_table() -> torch.Tensor:
    """`DETAILS` by number of kind and part, `(kinds, SLOT)`."""
    table = torch.ones(len(KINDS), SLOT)
    for row, kind in enumerate(KINDS.values()):
        for number, part in enumerate(kind.parts, 1):
            table[row, number] = DETAILS.get(part, 1.0)
    return table


def loss_weights(drawn: Render) -> torch.Tensor:
    """Weight of each pixel `(H, W)`, mean 1."""
    parts = torch.from_numpy(drawn.parts).long()
    rows = [list(KINDS).index(placed.character.kind) for placed in drawn.picture.subjects]
    weights = weight_table()[torch.tensor(rows)[parts // SLOT], parts % SLOT]
    return weights / weights.mean()
