"""The tokenizer and the text encoder's first lesson: `python -m train.text --config train/configs/storybook.toml`.

A text encoder that starts from zero beside a U-Net lags behind it (see train/README.md). Captions are free, so it first
learns to read: from the end of a caption it tells what was said (kind, expression, garment, scene, style, ...), and at
every token it predicts the next one. No picture is drawn.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nested_attention.files import replaced
from train.loop import Batch, LoopConfig, Task, fit
from train.processes import training_command
from train.settings import read_section
from train.storybook.captions import Caption, caption
from train.storybook.kinds import KINDS
from train.storybook.sampling import Picture, sample_picture
from train.storybook.scenes import SCENES
from train.storybook.styles import STYLES

MAX_TOKENS = 48
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: int = 20_000) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the world's captions one token; other words fall to pieces."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(",", "isolated"), pre_tokenizers.Split("-", "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    texts = (caption(sample_picture("train", i), random.Random(i)).text for i in range(captions))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[START, END], initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
    ))  # fmt: skip
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for letter in alphabet:  # a letter that ends an unknown word
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=MAX_TOKENS, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip


def said_fields() -> dict[str, tuple[str, ...]]:
    """What a caption can say, field by field; value 0 of each is "not said"."""
    attributes = {field for kind in KINDS.values() for field in kind.attributes}
    values = {
        field: tuple(sorted({v for kind in KINDS.values() for v in kind.attributes.get(field, ()) if v != "none"}))
        for field in sorted(attributes)
    }
    slots = {f"{which} {field}": ("", *content) for which in (0, 1) for field, content in {"kind": tuple(KINDS), **values}.items()}
    return {"scene": ("", *SCENES), "style": ("", *STYLES), **slots}


def said_labels(picture: Picture, said: Caption, fields: dict[str, tuple[str, ...]]) -> Tensor:
    """The index of what was said, for each of `fields`."""
    stated = {"scene": picture.scene if said.scene else "", "style": picture.style if said.style else ""}
    for which, placed in enumerate(picture.subjects):
        stated[f"{which} kind"] = placed.character.kind
        for field in said.mentioned[which]:
            value = placed.character.attributes[field]
            stated[f"{which} {field}"] = "" if value == "none" else value
    return torch.tensor([values.index(stated.get(field, "")) for field, values in fields.items()])


class Reader(nn.Module):
    """The text encoder with a head per field on the end token, and next-token prediction by its own embeddings."""

    def __init__(self, text_encoder: CLIPTextModel, sizes: list[int]):
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = nn.ModuleList(nn.Linear(text_encoder.config.hidden_size, size) for size in sizes)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = self.text_encoder(input_ids)
        logits = out.last_hidden_state[:, :-1] @ self.text_encoder.get_input_embeddings().weight.T
        return logits, [head(out.pooler_output) for head in self.heads]


class Captions(Dataset):
    def __init__(self, split: str, tokenizer: CLIPTokenizer, length: int):
        self.split, self.tokenizer, self.length, self.fields = split, tokenizer, length, said_fields()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        picture = sample_picture(self.split, index)
        said = caption(picture, random.Random(f"text/{self.split}/{index}"))
        ids = self.tokenizer(said.text, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
        return {"input_ids": ids, "labels": said_labels(picture, said, self.fields)}


@dataclass
class TextTask(Task):
    model: Reader
    tokenizer: CLIPTokenizer

    def dataset(self, length: int) -> Dataset:
        return Captions("train", self.tokenizer, length)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        ids = batch["input_ids"]
        longest = int((ids != self.tokenizer.eos_token_id).sum(1).max()) + 1
        ids = ids[:, :longest]
        following, fields = model(ids)
        targets = ids[:, 1:].masked_fill(ids[:, :-1] == self.tokenizer.eos_token_id, -100)
        language = F.cross_entropy(following.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        reading = sum(F.cross_entropy(logits.float(), batch["labels"][:, k]) for k, logits in enumerate(fields)) / len(fields)
        right = torch.stack([(logits.argmax(1) == batch["labels"][:, k]).float().mean() for k, logits in enumerate(fields)])
        return reading + 0.2 * language, {"language": float(language), "right": float(right.mean()), "worst": float(right.min())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.text", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    options = parser.parse_args()
    config = read_section(options.config, "text")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    reader = Reader(build_text_encoder(tokenizer, **config["model"]), [len(values) for values in said_fields().values()])
    reader.load_state_dict(fit(TextTask(reader, tokenizer), LoopConfig.from_dict(config["loop"]), options.out, config), strict=False)
    with replaced(options.out / "text_encoder") as fresh:
        reader.text_encoder.save_pretrained(fresh)
    with replaced(options.out / "tokenizer") as fresh:
        tokenizer.save_pretrained(fresh)


if __name__ == "__main__":
    with training_command():
        main()
