"""A Q-Former's first lesson: `python -m train.reader --kind person --config train/configs/storybook.toml`.

Token `n` learns to tell how tile `n` of the subject's portrait looks, whatever the reference shows: the portrait is
the subject in a square of its own, with attributes that are always the same. Every token also learns to name all that
lasts of the subject (its haircut, its hair's colour, ...), which is how the base knows things from words. One linear layer
reads every token, so this is written in all tokens alike, and a nested layer that learned to read one of them can
read all. The image encoder stays as it is; the adapter of the kind starts from this Q-Former.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import BitModel, PreTrainedModel

from nested_attention.bases import ASSETS
from nested_attention.encoder import QFormer, QFormerConfig, feature_dim, image_features
from nested_attention.files import replaced
from train.loop import Batch, LoopConfig, Task, fit, moved
from train.pixels import to_tensor
from train.processes import training_command
from train.settings import read_section
from train.storybook.dataset import weight_table
from train.storybook.kinds import KINDS
from train.storybook.picture import render
from train.storybook.sampling import Character, sample_picture, sample_reference

TILE, MARGIN = 6, 3  # pixels of a portrait
NAMING = 0.02  # weight of the fields' cross-entropy beside the pixels' error


def portrait(character: Character, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The subject's identity alone: premultiplied RGBA `(side, side, 4)` and the weights of its pixels `(side, side)`."""
    kind = KINDS[character.kind]
    plain = {field: "none" if "none" in values else values[0] for field, values in kind.attributes.items()}
    rgba, parts = kind.draw(character.identity, plain).resized(side)
    weights = weight_table()[list(KINDS).index(kind.name)].numpy()[parts]
    return rgba, weights


def fields_of(character: Character) -> torch.Tensor:
    """Class numbers of its identity's fields, `(fields,)`."""
    return torch.tensor([values.index(character.identity[field]) for field, values in KINDS[character.kind].identity.items()])


def tiles(picture: Tensor) -> Tensor:
    """`(B, C, side, side)` -> each tile with a margin around it: `(B, N, C * (TILE + 2 * MARGIN)^2)`."""
    return F.unfold(picture, TILE + 2 * MARGIN, padding=MARGIN, stride=TILE).mT


class Portraits(Dataset):
    """References with the portraits of whom they show."""

    def __init__(self, kind: str, split: str, length: int, side: int):
        self.kind, self.split, self.length, self.side = kind, split, length, side

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        target = sample_picture(self.split, index, (self.kind,))
        reference = render(sample_reference(target, 0, self.split, index)).image
        rgba, weights = portrait(target.subjects[0].character, self.side)
        return {
            "reference": to_tensor(reference), "portrait": torch.from_numpy(rgba).permute(2, 0, 1).contiguous(),
            "weights": torch.from_numpy(weights)[None], "fields": fields_of(target.subjects[0].character),
        }  # fmt: skip


class ReaderLesson(nn.Module):
    """The frozen image encoder, the Q-Former, and the layers that read its tokens."""

    def __init__(self, encoder: PreTrainedModel, reader: QFormer, kind: str):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.reader = reader
        self.look = nn.Linear(reader.config.output_dim, 4 * (TILE + 2 * MARGIN) ** 2)
        self.names = nn.ModuleList(nn.Linear(reader.config.output_dim, len(values)) for values in KINDS[kind].identity.values())

    def forward(self, references: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the tokens tell of their tiles, `(B, N, 4 * (TILE + 2 * MARGIN)^2)`, and logits of every field, `(B, N, values)`."""
        with torch.no_grad():
            features = image_features(self.encoder, references, -1)
        tokens = self.reader(features)
        return self.look(tokens), [name(tokens) for name in self.names]


@dataclass
class ReaderTask(Task):
    model: ReaderLesson
    kind: str

    @property
    def side(self) -> int:
        return TILE * round(self.model.reader.config.num_tokens**0.5)

    def dataset(self, length: int) -> Dataset:
        return Portraits(self.kind, "train", length, self.side)

    def held_out(self) -> DataLoader:
        return DataLoader(Portraits(self.kind, "validation", 192, self.side), 64)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        (seen, named), shown = model(batch["reference"]), tiles(batch["portrait"])
        weights = tiles(batch["weights"]).repeat(1, 1, 4)
        error = (weights * (seen.float() - shown) ** 2).mean() / weights.mean()
        fields = batch["fields"][:, :, None].expand(-1, -1, seen.shape[1])  # (B, fields, N)
        pairs = [(logits.float().flatten(0, 1), fields[:, k].flatten()) for k, logits in enumerate(named)]
        naming = torch.stack([F.cross_entropy(*pair) for pair in pairs]).mean()
        right = torch.stack([(logits.argmax(-1) == truth).float().mean() for logits, truth in pairs]).mean()
        return error + NAMING * naming, {"error": float(error.detach()), "right": float(right)}

    @torch.no_grad()
    def grid(self) -> Image.Image:
        """References, portraits, and what the tokens tell of them."""
        batch = moved(next(iter(self.held_out())), self.model.look.weight.device)
        made = self.model(batch["reference"][:16])[0].unflatten(2, (4, TILE + 2 * MARGIN, -1))[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        made = F.fold(made.flatten(2).mT, self.side, TILE, stride=TILE)
        pictures = [x[:, :3] + 1 - x[:, 3:] for x in (batch["portrait"][:16], made)]
        rows = [F.interpolate((batch["reference"][:16] + 1) / 2, self.side, mode="area"), *pictures]
        whole = torch.cat([torch.cat(list(row), 2) for row in rows], 1).clamp(0, 1).permute(1, 2, 0)
        return Image.fromarray((whole.cpu().numpy() * 255).astype(np.uint8))


def asked_for(lesson: str, description: str | None) -> tuple[str, Path, Path]:
    """What the command `python -m train.LESSON` was asked for: the kind, the folder of the run, and the config."""
    parser = argparse.ArgumentParser(prog=f"python -m train.{lesson}", description=description)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--out", type=Path, help=f"runs/{lesson}-KIND if not given")
    options = parser.parse_args()
    return options.kind, options.out or Path(f"runs/{lesson}-{options.kind}"), options.config


def main() -> None:
    kind, out, path = asked_for("reader", __doc__)
    config, adapter, text = (read_section(path, name) for name in ("reader", "adapter", "text"))
    torch.manual_seed(0)
    encoder = BitModel.from_pretrained(ASSETS / "storybook/image_encoder").float()
    sizes = QFormerConfig(**adapter["qformer"], feature_dim=feature_dim(encoder), output_dim=text["model"]["width"])
    lesson = ReaderLesson(encoder, QFormer(sizes), kind)
    lesson.load_state_dict(fit(ReaderTask(lesson, kind), LoopConfig.from_dict(config["loop"]), out, config), strict=False)
    with replaced(out / "reader.safetensors") as fresh:
        save_file(lesson.reader.state_dict(), fresh)


if __name__ == "__main__":
    with training_command():
        main()
