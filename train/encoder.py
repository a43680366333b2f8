"""The frozen image encoder: `python -m train.encoder --config train/configs/storybook.toml`.

It learns from pairs of pictures of one identity, read by a Q-Former of the adapters' size: what that reads of the two
should find each other in a batch (InfoNCE) and say what stays of a subject (kind, hair, fur, ...), and every
patch should know which part it shows, so that its features stay local. Then it is frozen; adapters read its last hidden
layer.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import BitConfig, BitModel

from nested_attention.encoder import QFormer, QFormerConfig, image_features
from nested_attention.files import replaced
from train.loop import Batch, LoopConfig, Task, fit
from train.processes import training_command
from train.settings import read_section
from train.storybook.kinds import KINDS
from train.storybook.labels import questions
from train.storybook.pairs import Pairs
from train.storybook.picture import SLOT

TEMPERATURE = 0.07


def find_each_other(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE both ways between rows of `(B, C)`; also the share of rows that find their partner."""
    with torch.autocast(first.device.type, enabled=False):  # at this temperature 16 bits are too coarse
        logits = F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T / TEMPERATURE
    partner = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2
    return loss, (logits.argmax(1) == partner).float().mean()


def answer_loss(logits: list[Tensor], answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all questions that apply (answer >= 0), and the share answered right."""
    losses, right = [], []
    for k, scores in enumerate(logits):
        applies = answers[:, k] >= 0
        if applies.any():
            losses.append(F.cross_entropy(scores[applies].float(), answers[applies, k]))
            right.append((scores[applies].argmax(1) == answers[applies, k]).float().mean())
    return torch.stack(losses).mean(), torch.stack(right).mean()


def lasting() -> list[int]:
    """Which of `questions()` ask for what stays of a subject: its kind and the identity fields of every kind."""
    names = {"kind", *(f"{name} {field}" for name, kind in KINDS.items() for field in kind.identity)}
    return [k for k, name in enumerate(questions()) if name in names]


class EncoderLesson(nn.Module):
    """The image encoder with its reader and the heads that teach both."""

    def __init__(self, encoder: BitModel, reader: QFormer, projected: int = 192):
        super().__init__()
        self.encoder, self.reader = encoder, reader
        sizes = [len(values) for values in questions().values()]
        tokens = reader.config.num_tokens * reader.config.output_dim
        self.heads = nn.ModuleList(nn.Linear(tokens, sizes[k]) for k in lasting())
        self.identity = nn.Linear(tokens, projected)
        self.parts = nn.Sequential(nn.LayerNorm(reader.config.feature_dim), nn.Linear(reader.config.feature_dim, len(KINDS) * SLOT))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Identity embedding `(B, C)`, logits per lasting question, part logits `(B, P, kinds * SLOT)`."""
        features = image_features(self.encoder, images, -1)
        tokens = self.reader(features).flatten(1)
        return self.identity(tokens), [head(tokens) for head in self.heads], self.parts(features)


@dataclass
class EncoderTask(Task):
    model: EncoderLesson

    def dataset(self, length: int) -> Dataset:
        return Pairs("train", length, blurred=False)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        images = batch["images"].transpose(0, 1).flatten(0, 1)  # all first, then all second
        answers = batch["answers"].transpose(0, 1).flatten(0, 1)
        embeddings, logits, parts = model(images.contiguous(memory_format=torch.channels_last))
        first, second = embeddings.chunk(2)
        kind = answers[:, list(questions()).index("kind")]
        seen = kind[: len(first)] >= 0
        identity, found = find_each_other(first[seen], second[seen])
        answering, right = answer_loss(logits, answers[:, lasting()])
        local = self.part_loss(parts.chunk(2)[1], batch["parts"], kind[len(first) :])
        logs = {"identity": float(identity), "found": float(found), "right": float(right), "local": float(local)}
        return 0.5 * identity + answering + local, logs

    @staticmethod
    def part_loss(logits: Tensor, parts: Tensor, kind: Tensor) -> Tensor:
        """Every patch names the part in its middle; background is part 0 of the kind."""
        side = round(logits.shape[1] ** 0.5)
        step = parts.shape[1] // side
        middle = parts[:, step // 2 :: step, step // 2 :: step].flatten(1) + SLOT * kind[:, None]
        return F.cross_entropy(logits.float().flatten(0, 1), middle.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.encoder", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/encoder"))
    options = parser.parse_args()
    config, adapter, text = (read_section(options.config, name) for name in ("encoder", "adapter", "text"))
    torch.manual_seed(0)
    encoder = BitModel(BitConfig(**config["model"]))
    sizes = QFormerConfig(**adapter["qformer"], feature_dim=encoder.config.hidden_sizes[-1], output_dim=text["model"]["width"])
    lesson = EncoderLesson(encoder, QFormer(sizes))
    lesson.load_state_dict(fit(EncoderTask(lesson), LoopConfig.from_dict(config["loop"]), options.out, config), strict=False)
    with replaced(options.out / "image_encoder") as fresh:
        lesson.encoder.save_pretrained(fresh)


if __name__ == "__main__":
    with training_command():
        main()
