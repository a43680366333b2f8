"""Training an adapter on the Storybook world's pictures."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.loop import Batch, moved
from train.objective import Diffusion
from train.personalizer import AdapterTask
from train.storybook.personal import PersonalPictures
from train.storybook.picture import render
from train.storybook.sampling import sample_picture
from train.whitening import whitening


@dataclass
class StorybookTask(AdapterTask):
    """Samples from the Storybook world."""

    diffusion: Diffusion
    sampled = 192  # samples for the held-out loss, and for the coordinates of the nested projections
    prompts = ("a drawing of {} in the snow", "{} on the beach", "a drawing of {} smiling on a blue background")

    def pictures(self, split: str, length: int) -> Dataset:
        stock = self.pipe.stock
        return PersonalPictures(self.model.adapter.config.kind, split, stock.tokenizer, length, self.diffusion, stock.vae.config.patch)

    def dataset(self, length: int) -> Dataset:
        return self.pictures("train", length)

    def held_out(self) -> Iterable[Batch]:
        return DataLoader(self.pictures("validation", self.sampled), 32)

    @torch.no_grad()
    def white(self) -> dict[str, Tensor]:
        """For the nested projections: they read tokens, here those of the first samples."""
        adapter = self.model.adapter
        device = self.model.stock.unet.device
        batches = (moved(batch, device) for batch in DataLoader(self.dataset(self.sampled), 32))
        tokens = torch.cat([adapter.qformer(self.model.conditions(batch)["features"].float()) for batch in batches])
        white = whitening(tokens.flatten(0, 1))
        return {name: white for name, _ in self.model.named_parameters() if name.startswith("adapter.layers.")}

    def references(self) -> list[Image.Image]:
        kind = self.model.adapter.config.kind
        return [Image.fromarray(render(sample_picture("validation", row, (kind,))).image) for row in range(4)]
