"""What the pictures look like while they are still being denoised."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor


@torch.no_grad()
def preview(stock: DiffusionPipeline, latents: Tensor) -> list[Image.Image]:
    """Decodes the scheduler's current idea of the clean picture, or the latents themselves where it keeps none."""
    outputs = [output for output in getattr(stock.scheduler, "model_outputs", ()) if output is not None]
    clean = outputs[-1] if outputs and stock.scheduler.config.get("algorithm_type", "").startswith("dpmsolver++") else latents
    pixels = stock.vae.decode(clean.to(stock.vae.dtype) / stock.vae.config.scaling_factor, return_dict=False)[0]
    return stock.image_processor.postprocess(pixels, output_type="pil")
