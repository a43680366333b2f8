"""Tiny real components: the architectures of SD and SDXL with random weights, and adapters for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)  # fmt: skip
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from nested_attention import Generation, NestedAttentionPipeline
from nested_attention.adapters import Adapter, AdapterConfig
from nested_attention.attention import LayerSubject, Text, plain
from nested_attention.bases import BASES
from nested_attention.condition import NestedCondition
from nested_attention.encoder import ImageConfig, QFormerConfig
from nested_attention.patches import PatchAutoencoder
from nested_attention.subjects import Subject
from train.objective import flow_scheduler
from train.text import build_tokenizer

WIDTH = 32
ARCHITECTURES = ("sd", "sdxl")


@cache
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(600)


def text_config() -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=words.model_max_length, projection_dim=WIDTH, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id,
    )  # fmt: skip


def stock(architecture: str) -> DiffusionPipeline:
    """A stock diffusers pipeline: 32 x 32 pictures (16 x 16 latents), three cross-attention resolutions or two."""
    torch.manual_seed(0)
    sdxl = architecture == "sdxl"
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D" if sdxl else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D" if sdxl else "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=2 * WIDTH if sdxl else WIDTH, use_linear_projection=sdxl,
        transformer_layers_per_block=(1, 2) if sdxl else 1,
        **({"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + WIDTH} if sdxl else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    first = CLIPTextModel(text_config())
    if sdxl:
        second = CLIPTextModelWithProjection(text_config())
        parts = {"text_encoder_2": second, "tokenizer_2": tokenizer(), "add_watermarker": False}
        made: DiffusionPipeline = StableDiffusionXLPipeline(
            vae=vae, text_encoder=first, tokenizer=tokenizer(), unet=unet, scheduler=scheduler, **parts
        )
    else:
        made = StableDiffusionPipeline(
            vae=vae, text_encoder=first, tokenizer=tokenizer(), unet=unet, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return made


def storybook() -> DiffusionPipeline:
    """The architecture of Storybook: 128 x 128 pixels in patches of 8 x 8."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=192, out_channels=192, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=(2, 2),
        cross_attention_dim=WIDTH, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=PatchAutoencoder(8), text_encoder=CLIPTextModel(text_config()), tokenizer=tokenizer(), unet=unet, scheduler=flow_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def photo(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture of noise, `size` as rows and columns."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def pixels(out: Generation) -> np.ndarray:
    """All pictures of a generation as numbers that can be subtracted: (num_images, height, width, 3)."""
    return np.stack([np.asarray(image) for image in out.images]).astype(int)


def vision(size: int = 32) -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=8,
        projection_dim=16,
    )
    return CLIPVisionModelWithProjection(config).eval()


def adapter(unet: UNet2DConditionModel, kind: str, **changes) -> Adapter:
    torch.manual_seed(sum(map(ord, kind)))
    width = unet.config.cross_attention_dim
    config = AdapterConfig(
        kind=kind, word=kind, base="tiny", image_encoder="vision", image=ImageConfig(size=32),
        qformer=QFormerConfig(num_tokens=6, width=32, depth=2, heads=2, head_dim=16, feature_dim=WIDTH, output_dim=width), **changes,
    )  # fmt: skip
    made = Adapter(config, unet)
    for layer in made.layers:  # a trained adapter is not a copy of the layer
        for projection in (layer.to_k, layer.to_v):
            projection.weight.data += 0.3 * torch.randn_like(projection.weight)
    made.revision = kind
    return made.eval().requires_grad_(False)


def pipeline(architecture: str, **changes) -> NestedAttentionPipeline:
    """A pipeline for persons and cats with random weights."""
    made = stock(architecture)
    base = replace(BASES["sd15"], name="tiny", steps=3, fast_steps=2, guidance_scale=3.0, negative_prompt="", size=32, sizes=(16, 64, 8))
    adapters = {kind: adapter(made.unet, kind, **changes) for kind in ("person", "cat")}
    pipe = NestedAttentionPipeline(base, made, adapters, dict.fromkeys(adapters, Path("/tiny")))
    pipe.image_encoders._loaded["/tiny/vision", "", None] = vision()
    return pipe


def step(
    pipe: NestedAttentionPipeline, condition: NestedCondition | None = None, batch: int = 2, grid: tuple[int, int] = (16, 16),
    states: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What the U-Net says of fixed noise `(batch, 4, *grid)` and text states `(batch, 24, C)`."""
    torch.manual_seed(5)
    config = pipe.stock.unet.config
    latents, fixed = torch.randn(batch, 4, *grid), torch.randn(batch, 24, config.cross_attention_dim)
    states = fixed if states is None else states
    added = None
    if config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(batch, WIDTH), "time_ids": torch.ones(batch, 6)}
    with torch.no_grad():
        return pipe.stock.unet(latents, 500, states, added_cond_kwargs=added, cross_attention_kwargs={"nested": condition}).sample


def layers(subjects: Sequence[Subject]) -> dict[str, list[LayerSubject]]:
    """Layer name -> subjects; the word of subject k is token 4 + 3 k of 24."""
    found: dict[str, list[LayerSubject]] = {}
    for k, subject in enumerate(subjects):
        columns = torch.zeros(1, 24)
        columns[0, 4 + 3 * k] = 1
        for name, layer in subject.layer_subjects(columns).items():
            found.setdefault(name, []).append(layer)
    return found


@contextmanager
def plain_form() -> Iterator[list[int]]:
    """Inside, layers compute the equation as it is written. Yields, layer by layer, how many rows of the batch had subjects."""
    seen: list[int] = []

    def attend(query: torch.Tensor, text: Text, subjects: Sequence[LayerSubject]) -> torch.Tensor:
        stock = len(query) - text.rows if subjects else len(query)
        parts = [torch.nn.functional.scaled_dot_product_attention(query[:stock], text.key[:stock], text.value[:stock])]
        if subjects:
            seen.append(text.rows)
            parts.append(plain(query[stock:], text.key[stock:], text.value[stock:], subjects))
        return torch.cat(parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nested_attention.processor.fast", attend)
        patch.setattr("nested_attention.condition.widened", lambda key, value, subjects, rows: Text(key, value, rows))
        yield seen
