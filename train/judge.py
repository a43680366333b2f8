"""The judge: `python -m train.judge --config train/configs/storybook.toml`.

A small convolutional network of its own, trained on renders only; it shares nothing with the image encoder or the base
model. It answers every question about a view of one subject (kind, scene, style, attributes, identity fields) and
embeds its identity. What it says of generated pictures is only as good as what it says of unseen renders, so its
accuracy on those is printed with every result.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from nested_attention.adapters import read_weights
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.files import replaced
from train.encoder import answer_loss, find_each_other
from train.loop import Batch, LoopConfig, Task, fit
from train.processes import training_command
from train.settings import read_section
from train.start import noted
from train.storybook.labels import questions
from train.storybook.pairs import Pairs


class Block(nn.Module):
    """Two 3 x 3 convolutions around a skip, halving the resolution first."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.down = nn.Conv2d(before, after, 2, stride=2)
        self.body = nn.Sequential(
            nn.GroupNorm(8, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1),
            nn.GroupNorm(8, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.body(x)


class Judge(nn.Module):
    """`(B, 3, 128, 128)` in -1..1 -> logits per question and an identity embedding `(B, 192)`."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 384), embedding: int = 192):
        super().__init__()
        self.widths = tuple(widths)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip((3, *widths[:-1]), widths, strict=True)))
        flat = widths[-1] * 16  # 4 x 4 places: where something is matters
        self.body = nn.Sequential(nn.GroupNorm(8, widths[-1]), nn.Flatten(), nn.Linear(flat, 512), nn.SiLU(), nn.LayerNorm(512))
        self.heads = nn.ModuleList(nn.Linear(512, len(values)) for values in questions().values())
        self.identity = nn.Linear(512, embedding)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        body = self.body(self.blocks(images))
        return [head(body) for head in self.heads], F.normalize(self.identity(body).float(), dim=-1)


def save_judge(judge: Judge, folder: Path) -> None:
    with replaced(folder) as fresh:
        fresh.mkdir()
        save_file({name: value.detach().half().contiguous() for name, value in judge.state_dict().items()}, fresh / "judge.safetensors")
        (fresh / "config.json").write_text(json.dumps({"widths": judge.widths, "embedding": judge.identity.out_features}) + "\n")


def load_judge(folder: Path) -> Judge:
    """The judge that `save_judge` has written, only to be asked.

    Raises:
        NestedAttentionError: a file is missing or damaged, or the judge answers other questions than there are now.
    """
    tensors, path = read_weights(folder / "judge.safetensors"), folder / "config.json"
    try:
        config = json.loads(path.read_text())
        judge = Judge(tuple(config["widths"]), config["embedding"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NestedAttentionError(f"{path} is missing or damaged ({error}); {get_back(path)}.") from error
    try:
        judge.load_state_dict(tensors)
    except RuntimeError as error:
        raise NestedAttentionError(
            f"the judge in {folder} answers other questions than this world has, or its config is that of another one; train it anew with "
            f"`python -m train.judge`, or {get_back(folder)}."
        ) from error
    return judge.eval().requires_grad_(False)


@dataclass
class JudgeTask(Task):
    model: Judge

    def dataset(self, length: int) -> Dataset:
        return Pairs("train", length, blurred=True)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        images = batch["images"].transpose(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        answers = batch["answers"].transpose(0, 1).flatten(0, 1)
        logits, embeddings = model(images)
        first, second = embeddings.chunk(2)
        seen = answers[: len(first), list(questions()).index("kind")] >= 0
        identity, found = find_each_other(first[seen], second[seen])
        answering, right = answer_loss(logits, answers)
        return identity + answering, {"identity": float(identity), "found": float(found), "right": float(right)}


@torch.no_grad()
def accuracy(judge: Judge, pairs: Pairs) -> dict[str, float]:
    """Share of right answers per question, and how often the reference finds its partner among the first 100; on the CPU."""
    logits: list[list[Tensor]] = []
    embeddings: list[Tensor] = []
    truth: list[np.ndarray] = []
    for start in range(0, len(pairs), 64):
        items = [pairs[i] for i in range(start, min(start + 64, len(pairs)))]
        scores, embedded = judge(torch.cat([item["images"] for item in items]))
        logits.append(scores)
        embeddings.append(embedded)
        truth.append(torch.cat([item["answers"] for item in items]).numpy())
    true = np.concatenate(truth)
    out = {}
    for k, name in enumerate(questions()):
        guess = torch.cat([scores[k] for scores in logits]).argmax(1).numpy()
        applies = true[:, k] >= 0
        out[name] = float((guess == true[:, k])[applies].mean())
    first, second = torch.cat(embeddings).unflatten(0, (-1, 2)).unbind(1)
    seen = torch.from_numpy(true[::2, list(questions()).index("kind")] >= 0)
    similar = second[seen][:100] @ first[seen][:100].T
    out["found among 100"] = float((similar.argmax(1) == torch.arange(len(similar))).float().mean())
    return {name: round(value, 4) for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.judge", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="judge folder to go on from, such as assets/storybook/judge")
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    options = parser.parse_args()
    config = read_section(options.config, "judge")
    torch.manual_seed(0)
    judge = load_judge(options.init).requires_grad_() if options.init else Judge()
    described = {**config, "start": noted(options.init) if options.init else None}
    judge.load_state_dict(fit(JudgeTask(judge), LoopConfig.from_dict(config["loop"]), options.out, described), strict=False)
    save_judge(judge, options.out / "judge")
    unseen = accuracy(judge.cpu(), Pairs("validation", 1024, blurred=False))
    with replaced(options.out / "accuracy.json") as fresh:
        fresh.write_text(json.dumps(unseen, indent=1) + "\n")
    print(json.dumps(unseen, indent=1))


if __name__ == "__main__":
    with training_command():
        main()
