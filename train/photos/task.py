"""Training an adapter on photos: samples with text, noise and sizes, batches of one bucket each, cached features."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from nested_attention.adapters import AdapterConfig
from nested_attention.files import replaced
from nested_attention.prompts import fill, placeholders
from train.loop import Batch, LoopConfig, Share
from train.objective import Diffusion
from train.personalizer import AdapterTask
from train.photos.batches import BucketBatches
from train.photos.dataset import PhotoDataset
from train.photos.part import Part
from train.photos.sample import Source

EVERY = 25  # of so many photos one is held out, at most HELD_OUT
HELD_OUT = 64
SHOWN = 4  # held-out photos in the sample grids


class PersonalPhotos(Dataset):
    """Samples for `train.personalizer` from photos.

    `features`: a folder with text states and image features by photo, as `cache_features` writes it; then samples bring
    these instead of token ids and references.
    """

    def __init__(self, photos: PhotoDataset, stock: DiffusionPipeline, config: AdapterConfig, features: Path | None):
        self.photos, self.config, self.features = photos, config, features
        self.tokenizers = [stock.tokenizer, *([stock.tokenizer_2] if hasattr(stock, "tokenizer_2") else [])]
        self.factor, self.channels = stock.vae_scale_factor, stock.unet.config.in_channels
        self.sized = stock.unet.config.addition_embed_type == "text_time"

    def __len__(self) -> int:
        return len(self.photos)

    def words(self, caption: str) -> tuple[Tensor, Tensor]:
        """Token ids `(encoders, L)` of a caption, and where the subject's word stands, `(L,)`."""
        (placeholder,) = placeholders(caption)
        filled = fill(caption, {placeholder: self.config.word})
        ids = [words(filled.text, padding="max_length", truncation=True, return_tensors="pt").input_ids for words in self.tokenizers]
        columns = torch.zeros(ids[0].shape[1])
        columns[list(filled.columns(placeholder, self.tokenizers[0]))] = 1.0
        return torch.cat(ids), columns

    def __getitem__(self, index: int) -> Batch:
        photo = self.photos[index]
        height, width = photo["pixels"].shape[1:]
        ids, columns = self.words(self.photos.caption(index))
        chance = Diffusion().draw(index, (self.channels, height // self.factor, width // self.factor))
        sample = {"pixels": photo["pixels"], "columns": columns, "level": chance["level"], "noise": chance["noise"]}
        if self.sized:
            sample["sizes"] = torch.cat([photo["size"], photo["crop"], photo["target"]]).float()
        if self.features is None:
            return sample | {"input_ids": ids, "reference": photo["reference"]}
        return sample | load_file(self.features / f"{self.photos.order[index]}.safetensors")


@dataclass
class PhotoTask(AdapterTask):
    """Samples from photos. `source`: all photos; `cache`: folder for features, or None to compute them in every step."""

    source: Source
    resolution: int
    cache: Path | None
    prompts = ("a photo of {} on the beach", "a pencil sketch of {}", "{} smiling, wearing a red hoodie, in the snow")

    @cached_property
    def parts(self) -> tuple[Part, Part]:
        """What is trained on, and what is held out."""
        held = list(range(0, len(self.source), EVERY))[1 : HELD_OUT + 1]
        rest = sorted(set(range(len(self.source))) - set(held))
        return Part(self.source, rest), Part(self.source, held)

    def photos(self, part: Part) -> PhotoDataset:
        return PhotoDataset(part, self.resolution, self.model.adapter.config.image)

    @cached_property
    def trained(self) -> PhotoDataset:
        """What is trained on; the sizes of all photos are read once."""
        return self.photos(self.parts[0])

    def dataset(self, length: int) -> Dataset:
        return PersonalPhotos(self.trained, self.pipe.stock, self.model.adapter.config, self.cache)

    def batches(self, config: LoopConfig, share: Share) -> Iterator[list[int]]:
        size = config.batch_size // config.accumulation
        first = share.step * config.accumulation
        return iter(BucketBatches(self.trained, size, share.rank, share.processes, first))

    def held_out(self) -> Iterable[Batch]:
        held = PersonalPhotos(self.photos(self.parts[1]), self.pipe.stock, self.model.adapter.config, None)
        return DataLoader(Subset(held, range(len(held))), 1)

    def references(self) -> list[Image.Image]:
        part = self.parts[1] if len(self.parts[1]) else self.parts[0]
        return [part[k].reference for k in range(min(SHOWN, len(part)))]

    @torch.no_grad()
    def cache_features(self, share: Share) -> None:
        """Writes text states and image features of this process's photos to `cache`; those that are there are kept."""
        assert self.cache is not None
        self.cache.mkdir(parents=True, exist_ok=True)
        photos = self.trained
        samples = PersonalPhotos(photos, self.pipe.stock, self.model.adapter.config, None)
        for index in range(share.rank, len(photos), share.processes):
            path = self.cache / f"{photos.order[index]}.safetensors"
            if not path.exists():
                batch: dict[str, Any] = {key: value[None].to(self.pipe.device) for key, value in samples[index].items()}
                known = {name: value[0].half().cpu().contiguous() for name, value in self.model.conditions(batch).items()}
                with replaced(path) as fresh:
                    save_file(known, fresh)
