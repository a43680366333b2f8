"""An adapter for one kind: `python -m train.adapter --kind person --config train/configs/storybook.toml`.

The picture to draw and the reference show the same identity with nothing else in common, so copying pixels does not
pay. Only the Q-Former and the nested projections learn, from the base's own diffusion loss; U-Net, text encoder and
image encoder stay as they are. One adapter knows nothing of the others.
"""

import argparse
import random
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

from nested_attention import NestedAttentionPipeline
from nested_attention.adapters import Adapter, AdapterConfig
from nested_attention.attention import LayerSubject
from nested_attention.condition import NestedCondition
from nested_attention.encoder import ImageConfig, QFormerConfig, image_features
from nested_attention.loading import load_base
from nested_attention.prompts import fill
from train.grids import personal_grid
from train.loop import Batch, LoopConfig, fit
from train.objective import FlowObjective, weighted_mean
from train.storybook.captions import caption
from train.storybook.dataset import Diffusion, loss_weights, part_weights, to_tensor, token_mask
from train.storybook.kinds import KINDS
from train.storybook.picture import render
from train.storybook.sampling import sample_picture, sample_reference


class PersonalPictures(Dataset):
    """Pictures of one kind with `<kind>` in the caption, and a reference of that subject. Item `i` as in `Pictures`.

    In two of five pictures somebody else stands beside the subject, named by an ordinary word.
    """

    def __init__(self, kind: str, split: str, tokenizer: CLIPTokenizer, length: int, diffusion: Diffusion):
        self.kind, self.split, self.tokenizer, self.length, self.diffusion = kind, split, tokenizer, length, diffusion
        self.weights = part_weights()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"personal/{self.kind}/{self.split}/{index}")
        kinds = [self.kind] if rng.random() < 0.6 else rng.sample([self.kind, rng.choice(tuple(KINDS))], 2)
        which = rng.choice([k for k, kind in enumerate(kinds) if kind == self.kind])
        drawn = render(sample_picture(self.split, index, tuple(kinds)))
        said = caption(drawn.picture, rng, tuple(f"<{self.kind}>" if k == which else None for k in range(len(kinds))))
        filled = fill(said.text, {f"<{self.kind}>": self.kind})
        input_ids, columns = token_mask(filled.text, filled.spans[f"<{self.kind}>"], self.tokenizer, 1)
        pixels = to_tensor(drawn.image)
        reference = render(sample_reference(drawn.picture, which, self.split, index)).image
        return {
            "pixels": pixels, "input_ids": input_ids, "columns": columns[0].float(), "reference": to_tensor(reference),
            "weights": loss_weights(drawn, self.weights), **self.diffusion.draw(index, tuple(pixels.shape)),
        }  # fmt: skip


class Personalizer(nn.Module):
    """Everything a training step runs through; only `adapter` learns."""

    def __init__(self, pipe: NestedAttentionPipeline, adapter: Adapter, image_encoder: CLIPVisionModelWithProjection):
        super().__init__()
        self.unet, self.text_encoder, self.image_encoder = pipe.stock.unet, pipe.stock.text_encoder, image_encoder
        self.requires_grad_(False)
        self.adapter = adapter.requires_grad_(True)

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor, columns: Tensor, reference: Tensor) -> Tensor:
        config = self.adapter.config
        with sdpa_kernel(SDPBackend.MATH):
            tokens = self.adapter.qformer(image_features(self.image_encoder, reference, config.image.layer))
            one = torch.ones((), device=tokens.device)
            layers = {
                name: [LayerSubject(columns, key, value, one, config.lam * one, one, config.value_norm)]
                for name, (key, value) in self.adapter.project(tokens).items()
            }
            condition = NestedCondition(len(noisy), layers)
            states = self.text_encoder(input_ids).last_hidden_state
            return self.unet(noisy, timesteps, states, cross_attention_kwargs={"nested": condition}).sample


@dataclass
class AdapterTask:
    model: Personalizer
    pipe: NestedAttentionPipeline
    diffusion: Diffusion

    def dataset(self, length: int) -> Dataset:
        return PersonalPictures(self.model.adapter.config.kind, "train", self.pipe.stock.tokenizer, length, self.diffusion)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        objective, patch, level = FlowObjective(), self.pipe.stock.vae.config.patch, batch["sigma"]
        noisy = F.pixel_unshuffle(objective.noisy(batch["pixels"], batch["noise"], level), patch)
        predicted = model(noisy, objective.timesteps(level), batch["input_ids"], batch["columns"], batch["reference"])
        error = objective.error(F.pixel_shuffle(predicted.float(), patch), batch["pixels"], batch["noise"], level)
        return weighted_mean(error, batch["weights"]), {}

    def grid(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, Personalizer)
        personal_grid(self.pipe, model.adapter, model.image_encoder, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.adapter", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--base", default="storybook")
    parser.add_argument("--out", type=Path, help="runs/adapter-KIND if not given")
    options = parser.parse_args()
    out = options.out or Path(f"runs/adapter-{options.kind}")
    config = tomllib.loads(options.config.read_text())["adapter"]
    torch.manual_seed(0)
    preset, stock = load_base(options.base, None, torch.float32)
    pipe = NestedAttentionPipeline(preset, stock, {}, {})
    assert preset.adapters is not None
    encoder = CLIPVisionModelWithProjection.from_pretrained(preset.adapters / options.kind / config["image_encoder"])
    sizes = QFormerConfig(**config["qformer"], feature_dim=encoder.config.hidden_size, output_dim=stock.unet.config.cross_attention_dim)
    described = AdapterConfig(
        options.kind, options.kind, preset.name, config["image_encoder"], value_norm=config["value_norm"], lam=config["lam"],
        qformer=sizes, image=ImageConfig(encoder.config.image_size),
    )  # fmt: skip
    model = Personalizer(pipe, Adapter(described, stock.unet), encoder.eval())
    task = AdapterTask(model, pipe, Diffusion(**config["diffusion"]))
    trained = fit(task, LoopConfig(**config["loop"]), out, {**config, "adapter": asdict(described)})
    assert isinstance(trained, Personalizer)
    trained.adapter.save(out / "adapter")


if __name__ == "__main__":
    main()
