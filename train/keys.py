"""The nested keys' first lesson: `python -m train.keys --kind person --config train/configs/storybook.toml`.

Token `n` tells how tile `n` of the subject's portrait looks (`train.reader`). Which token answers where is up to the
nested attention, and from the diffusion loss alone it learns that late: for long one token answers everywhere, and what a
single token can tell is little. Here the world's geometry helps out. The frozen U-Net looks at noisy pictures without
any subject; at every place of the subject's square the nested keys of every head learn to prefer the tile that belongs
there, as far as the layer's own queries can tell. Q-Former and nested values stay as they are, no picture is compared.
The result is the adapter that `train.adapter` starts from.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nested_attention.adapters import cross_attention_layers, read_weights, save_adapter
from nested_attention.attention import attention_logits, split_heads
from train.adapter import Job
from train.loop import Batch, LoopConfig, Task, fit
from train.objective import Diffusion, FlowObjective
from train.personalizer import Personalizer
from train.processes import training_command
from train.reader import asked_for
from train.settings import read_section
from train.storybook.personal import PersonalPictures
from train.storybook.scenes import CANVAS


def tile_shares(squares: Tensor, side: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Which tiles belong to each cell of a feature map: shares `(B, side^2, tiles^2)` that sum to 1, and inside `(B, side^2)`.

    `squares (B, 3)`: left, top and side in pixels of the square that a subject is drawn in. A cell's middle lies between
    four tiles' middles and is shared among them; `inside` says whether it lies in the square at all.
    """
    middles = (torch.arange(side, device=squares.device) + 0.5) * CANVAS / side

    def along(start: Tensor) -> tuple[Tensor, Tensor]:
        place = (middles - start[:, None]) / squares[:, 2:]  # (B, side), 0..1 inside
        distance = (place * tiles - 0.5).clamp(0, tiles - 1)[..., None] - torch.arange(tiles, device=squares.device)
        return (1 - distance.abs()).clamp(min=0), (place >= 0) & (place <= 1)

    (columns, in_columns), (rows, in_rows) = along(squares[:, 0]), along(squares[:, 1])
    shares = torch.einsum("brm,bcn->brcmn", rows, columns).flatten(3).flatten(1, 2)
    return shares, (in_rows[:, :, None] & in_columns[:, None]).flatten(1)


class KeysLesson(nn.Module):
    """A personalizer of which only the nested keys learn, and the queries that its U-Net's layers ask."""

    def __init__(self, model: Personalizer):
        super().__init__()
        self.model = model.requires_grad_(False)
        for layer in model.adapter.layers:
            layer.to_k.requires_grad_(True)
        self.queries: dict[str, Tensor] = {}
        for name, attention in cross_attention_layers(model.stock.unet).items():
            attention.to_q.register_forward_hook(lambda _, inputs, out, name=name: self.queries.update({name: out}))

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor, features: Tensor) -> list[Tensor]:
        """Logits of the nested attention, `(B, heads, HW, N)` for every layer."""
        with torch.no_grad():
            self.model.stock.unet(noisy, timesteps, states)
            tokens = self.model.adapter.qformer(features.float())
        logits = []
        for name, (key, _) in self.model.adapter.project(tokens).items():
            query = split_heads(self.queries.pop(name), key.shape[1])
            logits.append(attention_logits(query, key))
        return logits


@dataclass
class KeysTask(Task):
    model: KeysLesson
    kind: str
    diffusion: Diffusion

    def dataset(self, length: int) -> Dataset:
        stock = self.model.model.stock
        return PersonalPictures(self.kind, "train", stock.tokenizer, length, self.diffusion, stock.vae.config.patch)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        objective, level, known = FlowObjective(), batch["level"], self.model.model.conditions(batch)
        noisy = objective.noisy(self.model.model.latents(batch["pixels"]), batch["noise"], level)
        losses, right = [], []
        for logits in model(noisy, objective.timesteps(level), known["states"], known["features"]):
            tiles, side = round(logits.shape[-1] ** 0.5), round(logits.shape[2] ** 0.5)
            shares, inside = tile_shares(batch["square"], side, tiles)
            missed = -(shares[:, None] * logits.float().log_softmax(-1)).sum(-1)  # (B, heads, HW)
            counted = inside[:, None].expand_as(missed)
            losses.append(missed[counted].mean())
            right.append((logits.argmax(-1) == shares.argmax(-1)[:, None])[counted].float().mean())
        return torch.stack(losses).mean(), {"right": float(torch.stack(right).mean())}


def main() -> None:
    kind, out, path = asked_for("keys", __doc__)
    lesson = read_section(path, "keys")
    config = {name: value for name, value in read_section(path, "adapter").items() if name != "start"}
    torch.manual_seed(0)
    model, _ = Job(kind, kind, "storybook", None, None, None, out, config).model()
    model.adapter.qformer.load_state_dict(read_weights(Path(lesson["reader"].format(kind=kind))))
    task = KeysTask(KeysLesson(model), kind, Diffusion(**config["diffusion"]))
    learned = fit(task, LoopConfig.from_dict(lesson["loop"]), out, {"adapter": asdict(model.adapter.config)})
    task.model.load_state_dict(learned, strict=False)
    save_adapter(out / "adapter", model.adapter.config, model.adapter.state_dict(), torch.float32)


if __name__ == "__main__":
    with training_command():
        main()
