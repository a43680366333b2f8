"""Fixed-seed sample grids: what step 200, 1000, 5000 of a training looks like."""

from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from nested_attention import NestedAttentionPipeline, Subject, SubjectCache
from nested_attention.adapters import Adapter
from nested_attention.encoding import encode_image
from train.storybook.picture import render
from train.storybook.sampling import sample_picture

PERSONAL_PROMPTS = ("a drawing of {} in the snow", "{} on the beach", "a drawing of {} smiling on a blue background")


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
    path: Path,
    rows: int = 2,
) -> None:
    """One column a prompt, `rows` seeds below each other."""

    def encode(texts: tuple[str, ...]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return text_encoder(ids.to(text_encoder.device)).last_hidden_state

    with torch.autocast(unet.device.type, torch.bfloat16):
        states, unconditional = encode(prompts), encode(("",))
        pictures = [F.pixel_shuffle(sample(unet, states.float(), unconditional.float(), scheduler, seed), patch) for seed in range(rows)]
    stacked = torch.cat([torch.cat(list(row), 2) for row in pictures], 1)  # (3, rows * H, prompts * W)
    array = ((stacked.permute(1, 2, 0).float().cpu().numpy() + 1) * 127.5).clip(0, 255).astype(np.uint8)
    Image.fromarray(array).save(path)


def personal_grid(
    pipe: NestedAttentionPipeline, adapter: Adapter, encoder: CLIPVisionModelWithProjection, path: Path, rows: int = 4
) -> None:
    """One row an unseen identity: its reference, then what three prompts make of it."""
    kind = adapter.config.kind
    pages = []
    for row in range(rows):
        drawn = render(sample_picture("validation", row, (kind,)))
        encoded = encode_image(Image.fromarray(drawn.image), adapter, encoder, SubjectCache())
        subject = Subject(f"<{kind}>", kind, adapter.config.word, (encoded,), 1.0, adapter.config.lam, 1.0, adapter.config.value_norm)
        cells = [drawn.image]
        for prompt in PERSONAL_PROMPTS:
            cells.append(np.asarray(pipe(prompt.format(f"<{kind}>"), [subject], seed=row).images[0]))
        pages.append(np.concatenate(cells, 1))
    Image.fromarray(np.concatenate(pages)).save(path)
