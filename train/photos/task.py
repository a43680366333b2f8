"""Training an adapter on photos: samples with text, noise and sizes, batches of one bucket each, cached features."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedTokenizerBase

from nested_attention.adapters import AdapterConfig
from nested_attention.errors import NestedAttentionError
from nested_attention.prompts import fill, placeholders
from train.loop import Batch, LoopConfig, Share
from train.objective import Diffusion
from train.personalizer import AdapterTask
from train.photos.batches import BucketBatches
from train.photos.cache import FeatureCache
from train.photos.dataset import PhotoDataset
from train.photos.part import Part
from train.photos.sample import Source
from train.processes import this_process

EVERY = 25  # of so many photos one is held out, at most HELD_OUT
HELD_OUT = 64
SHOWN = 4  # held-out photos in the sample grids


def read_caption(caption: str, word: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[int, ...]]:
    """A caption with `word` for its placeholder, and the tokens where the text encoder reads it; none if they are cut off."""
    (placeholder,) = placeholders(caption)
    filled = fill(caption, {placeholder: word})
    return filled.text, filled.columns(placeholder, tokenizer)


class PersonalPhotos(Dataset):
    """Samples for `train.personalizer` from photos; with `cache` they bring features instead of token ids and references."""

    def __init__(self, photos: PhotoDataset, stock: DiffusionPipeline, config: AdapterConfig, cache: FeatureCache | None):
        self.photos, self.config, self.cache = photos, config, cache
        self.tokenizers = [stock.tokenizer, *([stock.tokenizer_2] if hasattr(stock, "tokenizer_2") else [])]
        self.factor, self.channels = stock.vae_scale_factor, stock.unet.config.in_channels
        self.sized = stock.unet.config.addition_embed_type == "text_time"

    def __len__(self) -> int:
        return len(self.photos)

    def words(self, caption: str) -> tuple[Tensor, Tensor]:
        """Token ids `(encoders, L)` of a caption, and where the subject's word stands, `(L,)`."""
        text, places = read_caption(caption, self.config.word, self.tokenizers[0])
        ids = [words(text, padding="max_length", truncation=True, return_tensors="pt").input_ids for words in self.tokenizers]
        columns = torch.zeros(ids[0].shape[1])
        columns[list(places)] = 1.0
        return torch.cat(ids), columns

    def __getitem__(self, index: int) -> Batch:
        photo = self.photos[index]
        height, width = photo["pixels"].shape[1:]
        ids, columns = self.words(self.photos.caption(index))
        chance = Diffusion().draw(index, (self.channels, height // self.factor, width // self.factor))
        sample = {"pixels": photo["pixels"], "columns": columns, "level": chance["level"], "noise": chance["noise"]}
        if self.sized:
            sample["sizes"] = torch.cat([photo["size"], photo["crop"], photo["target"]]).float()
        if self.cache is None:
            return sample | {"input_ids": ids, "reference": photo["reference"]}
        return sample | self.cache.load(self.photos.order[index])


@dataclass
class PhotoTask(AdapterTask):
    """Samples from photos. `source`: all photos; `cache`: for their features, or None to compute them in every step."""

    source: Source
    resolution: int
    cache: FeatureCache | None
    prompts = ("a photo of {} on the beach", "a pencil sketch of {}", "{} smiling, wearing a red hoodie, in the snow")

    @cached_property
    def parts(self) -> tuple[Part, Part]:
        """What is trained on, and what is held out: one of 25, but of few photos the last, and nothing of a single one."""
        numbers = self.usable()
        held = numbers[EVERY::EVERY][:HELD_OUT] or numbers[1:][-1:]
        rest = sorted(set(numbers) - set(held))
        return Part(self.source, rest), Part(self.source, held)

    def usable(self) -> list[int]:
        """The photos whose captions name the subject before the text encoder's input ends; how many do not is said.

        Raises:
            NestedAttentionError: none does.
        """
        word, tokenizer = self.model.adapter.config.word, self.pipe.stock.tokenizer
        numbers = [k for k in range(len(self.source)) if read_caption(self.source.caption(k), word, tokenizer)[1]]
        if left_out := sorted(set(range(len(self.source))) - set(numbers)):
            said = (
                f"{len(left_out)} of {len(self.source)} photos are left out, since their captions name the subject behind the "
                f'{tokenizer.model_max_length - 2} words that the text encoder reads, first "{self.source.caption(left_out[0])[:80]}…"'
            )
            if not numbers:
                raise NestedAttentionError(f"{said}; name it earlier.")
            this_process().print(said)
        return numbers

    def photos(self, part: Part) -> PhotoDataset:
        return PhotoDataset(part, self.resolution, self.model.adapter.config.image)

    @cached_property
    def trained(self) -> PhotoDataset:
        """What is trained on; the sizes of all photos are read once."""
        return self.photos(self.parts[0])

    def samples(self, photos: PhotoDataset, cache: FeatureCache | None = None) -> PersonalPhotos:
        return PersonalPhotos(photos, self.pipe.stock, self.model.adapter.config, cache)

    def dataset(self, length: int) -> Dataset:
        return self.samples(self.trained, self.cache)

    def batches(self, config: LoopConfig, share: Share) -> Iterator[list[int]]:
        size = config.batch_size // config.accumulation
        first = share.step * config.accumulation
        return iter(BucketBatches(self.trained, size, share.rank, share.processes, first))

    def held_out(self) -> Iterable[Batch]:
        held = self.samples(self.photos(self.parts[1]))
        return DataLoader(Subset(held, range(len(held))), 1)

    def references(self) -> list[Image.Image]:
        part = self.parts[1] if len(self.parts[1]) else self.parts[0]
        return [part[k].reference for k in range(min(SHOWN, len(part)))]

    def made_of(self) -> dict[str, str]:
        """All that cached features depend on."""
        config, base, part = self.model.adapter.config, self.pipe.base, self.parts[0]
        marks = "\n".join(map(part.mark, range(len(part))))
        return {
            "data": sha256(marks.encode()).hexdigest(), "kind": config.kind, "word": config.word, "base": f"{base.source} {base.revision}",
            "image encoder": f"{config.image_encoder} {config.image_subfolder} {config.image_revision} {config.image}",
        }  # fmt: skip

    @torch.no_grad()
    def cache_features(self, share: Share) -> None:
        """Fills the cache with this process's photos; what is there is kept."""
        assert self.cache is not None
        self.cache.claim(self.made_of())
        samples = self.samples(self.trained)
        for index in range(share.rank, len(self.trained), share.processes):
            number = self.trained.order[index]
            if not self.cache.file(number).exists():
                batch: dict[str, Any] = {key: value[None].to(self.pipe.device) for key, value in samples[index].items()}
                self.cache.save(number, {name: value[0] for name, value in self.model.conditions(batch).items()})
