"""What an adapter learns from, the same for every base: the base's own diffusion loss, with the subject in its word.

Only the Q-Former and the nested projections learn; U-Net, VAE, text encoders and image encoder stay as they are. One
adapter knows nothing of the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from transformers import CLIPVisionModelWithProjection

from nested_attention import NestedAttentionPipeline
from nested_attention.adapters import Adapter
from nested_attention.attention import LayerSubject
from nested_attention.condition import NestedCondition
from nested_attention.encoder import image_features
from train.grids import personal_grid
from train.loop import Batch, Task
from train.objective import Diffusion, objective_of, weighted_mean
from train.storybook.personal import PersonalPictures


def text_states(stock: DiffusionPipeline, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the U-Net reads of prompts: states `(B, L, C)`, and for SDXL the pooled text `(B, P)`.

    `input_ids (B, encoders, L)`: one row for each of the base's tokenizers.
    """
    if not hasattr(stock, "text_encoder_2"):
        return stock.text_encoder(input_ids[:, 0]).last_hidden_state, None
    first = stock.text_encoder(input_ids[:, 0], output_hidden_states=True)
    second = stock.text_encoder_2(input_ids[:, 1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


class Personalizer(nn.Module):
    """Everything a training step runs through; only `adapter` learns."""

    def __init__(self, stock: DiffusionPipeline, adapter: Adapter, image_encoder: CLIPVisionModelWithProjection):
        super().__init__()
        self.stock = stock
        self.frozen = nn.ModuleList(part for part in stock.components.values() if isinstance(part, nn.Module)).eval()
        self.image_encoder = image_encoder.eval()
        self.requires_grad_(False)
        self.adapter = adapter.requires_grad_(True)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """`(B, 3, H, W)` in -1..1 -> what the U-Net denoises, `(B, C, h, w)`."""
        vae = self.stock.vae
        return vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    def forward(
        self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor, columns: Tensor, reference: Tensor, sizes: Tensor | None = None
    ) -> Tensor:
        """The U-Net's prediction `(B, C, h, w)`.

        `columns (B, L)`: where the subject's word stands; `reference`: the image encoder's input; `sizes (B, 6)`: for
        SDXL the original size, the corner of the crop, and the size, each as height and width.
        """
        config, unet = self.adapter.config, self.stock.unet
        with sdpa_kernel([SDPBackend.MATH] if noisy.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            with torch.no_grad():
                features = image_features(self.image_encoder, reference.to(self.image_encoder.dtype), config.image.layer)
                states, pooled = text_states(self.stock, input_ids)
            one = torch.ones((), device=noisy.device)
            layers = {
                name: [LayerSubject(columns, key, value, one, config.lam * one, one, config.value_norm)]
                for name, (key, value) in self.adapter.project(self.adapter.qformer(features.float())).items()
            }
            condition = NestedCondition(len(noisy), layers)
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
            return unet(
                noisy.to(unet.dtype),
                timesteps,
                states.to(unet.dtype),
                added_cond_kwargs=added,
                cross_attention_kwargs={"nested": condition},
            ).sample


@dataclass
class AdapterTask(Task):
    """Training of one adapter; who gives the samples is left open."""

    model: Personalizer
    pipe: NestedAttentionPipeline

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        objective, level, noise = objective_of(self.pipe.stock.scheduler), batch["level"], batch["noise"]
        clean = self.model.latents(batch["pixels"])
        noisy = objective.noisy(clean, noise, level)
        predicted = model(noisy, objective.timesteps(level), batch["input_ids"], batch["columns"], batch["reference"], batch.get("sizes"))
        error = objective.error(predicted.float(), clean, noise, level)
        return weighted_mean(error, batch.get("weights", torch.ones(1, device=error.device).expand_as(error))), {}


@dataclass
class StorybookTask(AdapterTask):
    """Samples from the Storybook world."""

    diffusion: Diffusion

    def pictures(self, split: str, length: int) -> Dataset:
        stock = self.pipe.stock
        return PersonalPictures(self.model.adapter.config.kind, split, stock.tokenizer, length, self.diffusion, stock.vae.config.patch)

    def dataset(self, length: int) -> Dataset:
        return self.pictures("train", length)

    def held_out(self) -> Dataset:
        return self.pictures("validation", 192)

    def grid(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, Personalizer)
        personal_grid(self.pipe, model.adapter, model.image_encoder, path)
