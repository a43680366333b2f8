"""The frozen image encoder: `python -m train.encoder --config train/configs/storybook.toml`.

It learns from pairs of pictures of one identity: their embeddings should find each other in a batch (InfoNCE), the
class token should answer every question about the picture, and every patch should know which part it shows, so that
its features stay local. Then it is frozen; adapters read its last hidden layer.
"""

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from train.loop import Batch, LoopConfig, Task, fit
from train.storybook.kinds import KINDS
from train.storybook.labels import questions
from train.storybook.pairs import Pairs
from train.storybook.picture import SLOT
from train.storybook.scenes import CANVAS

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


class EncoderLesson(nn.Module):
    """The image encoder with the heads that teach it."""

    def __init__(self, encoder: CLIPVisionModelWithProjection):
        super().__init__()
        self.encoder = encoder
        width, projected = encoder.config.hidden_size, encoder.config.projection_dim
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in questions().values())
        self.identity = nn.Linear(width, projected)
        self.parts = nn.Linear(width, len(KINDS) * SLOT)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Identity embedding `(B, C)`, logits per question, part logits `(B, P, kinds * SLOT)`."""
        states = self.encoder.vision_model(images).last_hidden_state
        whole = self.encoder.vision_model.post_layernorm(states[:, 0])
        return self.encoder.visual_projection(whole), [head(whole) for head in self.heads], self.parts(states[:, 1:])


@dataclass
class EncoderTask(Task):
    model: EncoderLesson

    def dataset(self, length: int) -> Dataset:
        return Pairs("train", length, blurred=False)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        images = batch["images"].transpose(0, 1).flatten(0, 1)  # all first, then all second
        answers = batch["answers"].transpose(0, 1).flatten(0, 1)
        embeddings, logits, parts = model(images)
        first, second = embeddings.chunk(2)
        kind = list(questions()).index("kind")
        seen = answers[: len(first), kind] >= 0
        identity, found = find_each_other(first[seen], second[seen])
        answering, right = answer_loss(logits, answers)
        local = self.part_loss(parts.chunk(2)[1], batch["parts"], answers[len(first) :, kind])
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
    config = tomllib.loads(options.config.read_text())["encoder"]
    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=CANVAS, **config["model"]))
    trained = fit(EncoderTask(EncoderLesson(encoder)), LoopConfig(**config["loop"]), options.out, config)
    assert isinstance(trained, EncoderLesson)
    trained.encoder.save_pretrained(options.out / "image_encoder")


if __name__ == "__main__":
    main()
