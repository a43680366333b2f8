"""Previews: latents get their colours without the VAE, Storybook's patches are pixels already."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from nested_attention.preview import SD15_COLOURS, SDXL_COLOURS, clean_idea, preview
from tests import tiny
from train.objective import flow_scheduler


@pytest.mark.parametrize(("architecture", "matrix"), [("sd", SD15_COLOURS), ("sdxl", SDXL_COLOURS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_four_channels_get_their_colours_without_the_vae(architecture: str, matrix, dtype: torch.dtype, monkeypatch) -> None:
    stock = tiny.stock(architecture)
    monkeypatch.setattr(stock.vae, "decode", None)
    latents = torch.randn(2, 4, 6, 10, dtype=dtype)
    latents[1] = torch.tensor([1.0, 0.5, -0.5, 0.25], dtype=dtype)[:, None, None]
    pictures = preview(stock, latents)
    assert [picture.size for picture in pictures] == [(20, 12)] * 2
    expected = (torch.tensor([1.0, 0.5, -0.5, 0.25]) @ torch.tensor(matrix) + 1) * 127.5
    assert np.abs(np.asarray(pictures[1], float) - expected.numpy()).max() <= 1
    assert np.asarray(pictures[0]).std() > 20


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, DDIMScheduler])
def test_noise_never_outshines_the_picture(kind: Any) -> None:
    """Of a picture of unit variance whose noise the U-Net tells exactly."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = kind.from_config({**betas, "clip_sample": False})
    scheduler.set_timesteps(6)
    noise = torch.randn(1, 4, 64, 64)
    latents = scheduler.add_noise(torch.randn_like(noise), noise, scheduler.timesteps[:1])
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(noise, timestep, latents).prev_sample
        assert clean_idea(scheduler, latents, timestep).std() == pytest.approx(1, abs=0.05)


def test_a_solver_that_keeps_its_idea_of_the_clean_picture_tells_it() -> None:
    scheduler = flow_scheduler()
    scheduler.set_timesteps(4)
    noise, clean = torch.randn(2, 1, 192, 16, 16)
    for timestep in scheduler.timesteps:
        scheduler.step(clean, timestep, noise)
        torch.testing.assert_close(clean_idea(scheduler, noise, timestep), clean)


def test_patches_are_decoded() -> None:
    stock = tiny.storybook()
    (picture,) = preview(stock, torch.zeros(1, 192, 16, 16))
    assert picture.size == (128, 128) and len(set(picture.getdata())) == 1
