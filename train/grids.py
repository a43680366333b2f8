"""Fixed-seed sample grids: what step 200, 1000, 5000 of a training looks like."""

import numpy as np
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from nested_attention.loading import computes_bfloat16


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    states: Tensor,
    unconditional: Tensor,
    scheduler: SchedulerMixin,
    seed: int,
    steps: int = 24,
    guidance_scale: float = 2.5,
) -> Tensor:
    """Patches `(B, C, H, W)` for text states `(B, L, C)`, by classifier-free guidance."""
    side, channels = unet.config.sample_size, unet.config.in_channels
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(states), channels, side, side, generator=generator).to(states)
    both = torch.cat([unconditional.expand_as(states), states])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        without, conditional = unet(torch.cat([x, x]), t, both).sample.float().chunk(2)
        x = scheduler.step(without + guidance_scale * (conditional - without), t, x).prev_sample
    return x


@torch.no_grad()
def sample_grid(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: SchedulerMixin,
    patch: int,
    prompts: tuple[str, ...],
    rows: int = 2,
) -> Image.Image:
    """One column a prompt, `rows` seeds below each other."""

    def encode(texts: tuple[str, ...]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return text_encoder(ids.to(text_encoder.device)).last_hidden_state

    with torch.autocast(unet.device.type, torch.bfloat16, enabled=computes_bfloat16(unet.device)):
        states, unconditional = encode(prompts), encode(("",))
        pictures = [F.pixel_shuffle(sample(unet, states.float(), unconditional.float(), scheduler, seed), patch) for seed in range(rows)]
    stacked = torch.cat([torch.cat(list(row), 2) for row in pictures], 1)  # (3, rows * H, prompts * W)
    array = ((stacked.permute(1, 2, 0).float().cpu().numpy() + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return Image.fromarray(array)
