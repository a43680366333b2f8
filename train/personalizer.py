"""What an adapter learns from, the same for every base: the base's own diffusion loss, with the subject in its word.

Only the Q-Former and the nested projections learn; U-Net, VAE, text encoders and image encoder stay as they are. One
adapter knows nothing of the others.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from nested_attention import NestedAttentionPipeline, SubjectCache
from nested_attention.adapters import Adapter
from nested_attention.attention import LayerSubject
from nested_attention.condition import NestedCondition
from nested_attention.encoder import image_features
from nested_attention.encoding import encode_subject
from nested_attention.images import padded_square
from train.evening import evened
from train.loop import Batch, Task
from train.objective import objective_of, weighted_mean


def text_states(stock: DiffusionPipeline, input_ids: Tensor) -> dict[str, Tensor]:
    """What the U-Net reads of prompts: `states (B, L, C)`, and for SDXL the pooled text, `pooled (B, P)`.

    `input_ids (B, encoders, L)`: one row for each of the base's tokenizers.
    """
    if not hasattr(stock, "text_encoder_2"):
        return {"states": stock.text_encoder(input_ids[:, 0]).last_hidden_state}
    first = stock.text_encoder(input_ids[:, 0], output_hidden_states=True)
    second = stock.text_encoder_2(input_ids[:, 1], output_hidden_states=True)
    return {"states": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), "pooled": second.text_embeds}


class Personalizer(nn.Module):
    """Everything a training step runs through; only `adapter` learns. `even`: no sample drowns the others (`train.evening`)."""

    def __init__(self, stock: DiffusionPipeline, adapter: Adapter, image_encoder: PreTrainedModel, even: bool = False):
        super().__init__()
        self.even = even
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

    @torch.no_grad()
    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """Text states and image features, `(B, P, F)`, of a batch that brings token ids and references."""
        reference = batch["reference"].to(self.image_encoder.dtype)
        features = image_features(self.image_encoder, reference, self.adapter.config.image.layer)
        return {"features": features, **text_states(self.stock, batch["input_ids"])}

    def in_one_dtype(self) -> AbstractContextManager:
        """Inside, the adapter, which is in 32 bit, computes as the frozen parts do where these are in 16, even without autocast."""
        unet = self.stock.unet
        if unet.dtype == torch.float32 or torch.is_autocast_enabled(unet.device.type):
            return nullcontext()
        return torch.autocast(unet.device.type, unet.dtype)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, columns: Tensor, states: Tensor, features: Tensor,
        pooled: Tensor | None = None, sizes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The U-Net's prediction `(B, C, h, w)`.

        `columns (B, L)`: where the subject's word stands in `states (B, L, C)`; for SDXL `pooled (B, P)` and `sizes
        (B, 6)`: the original size, the corner of the crop, and the size, each as height and width.
        """
        config, unet = self.adapter.config, self.stock.unet
        one = torch.ones((), device=noisy.device)
        projected = self.adapter.project(self.adapter.qformer(features.float()))
        if self.even:
            projected = {name: (evened(key), evened(value)) for name, (key, value) in projected.items()}
        layers = {
            name: [LayerSubject(columns, key, value, one, config.lam * one, one, config.value_norm)]
            for name, (key, value) in projected.items()
        }
        condition = NestedCondition(len(noisy), layers)
        added = None if pooled is None else {"text_embeds": pooled.to(unet.dtype), "time_ids": sizes}
        return unet(
            noisy.to(unet.dtype), timesteps, states.to(unet.dtype), added_cond_kwargs=added, cross_attention_kwargs={"nested": condition}
        ).sample


@dataclass
class AdapterTask(Task):
    """Training of one adapter; who gives the samples is left open.

    A sample holds `pixels`, `columns`, `level` and `noise`; `input_ids` and `reference`, or what `conditions` makes of
    them; for SDXL `sizes`; and if it likes `weights` of the latents' elements.
    """

    model: Personalizer
    pipe: NestedAttentionPipeline
    prompts: ClassVar[tuple[str, ...]]  # of the sample grids, with {} for the subject

    @abstractmethod
    def references(self) -> list[Image.Image]:
        """Pictures of subjects that are not trained on, for the sample grids."""

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        objective, level, noise = objective_of(self.pipe.stock.scheduler), batch["level"], batch["noise"]
        clean = self.model.latents(batch["pixels"])
        known = batch if "features" in batch else self.model.conditions(batch)
        conditions = {name: known[name] for name in ("states", "features", "pooled") if name in known}
        with self.model.in_one_dtype():
            predicted = model(
                objective.noisy(clean, noise, level), objective.timesteps(level), batch["columns"], sizes=batch.get("sizes"), **conditions
            )
        error = objective.error(predicted.float(), clean, noise, level)
        return weighted_mean(error, batch.get("weights", torch.ones_like(error))), {}

    def units(self) -> list[nn.Module]:
        unet, adapter = self.model.stock.unet, self.model.adapter
        blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
        return [*blocks, unet, adapter.qformer, *adapter.layers]

    def grid(self) -> Image.Image:
        """One row a reference: itself, then what the prompts make of it."""
        adapter, side = self.model.adapter, self.pipe.base.size
        rows = []
        for seed, reference in enumerate(self.references()):
            with self.model.in_one_dtype():
                subject = encode_subject(f"<{adapter.config.kind}>", [reference], adapter, self.model.image_encoder, SubjectCache())
                made = [self.pipe(prompt.format(subject.placeholder), [subject], seed=seed).images[0] for prompt in self.prompts]
            rows.append(np.concatenate([np.asarray(image) for image in (padded_square(reference, side), *made)], 1))
        return Image.fromarray(np.concatenate(rows))
