"""What the pictures look like while they are still being denoised."""

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

# Red, green and blue in -1..1 from the four channels of a latent, fitted to what the VAEs decode; from InvokeAI (Apache 2.0),
# invokeai/app/util/step_callback.py, by torridgristle (SD 1.5) and StAlKeR7779 (SDXL).
SD15_COLOURS = (0.3444, 0.1385, 0.0670), (0.1247, 0.4027, 0.1494), (-0.3192, 0.2513, 0.2103), (-0.1307, -0.1874, -0.7445)
SDXL_COLOURS = (0.3816, 0.4930, 0.5320), (-0.3753, 0.1631, 0.1739), (0.1770, 0.3588, -0.2048), (-0.4350, -0.2644, -0.4289)


def clean_idea(scheduler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
    """The scheduler's idea of the clean picture after the step at `timestep`; where it keeps none, the latents as the U-Net is given them.

    Those of Euler's kind carry noise of many times their own size, and are scaled for the U-Net; the others are not.
    """
    outputs = [output for output in getattr(scheduler, "model_outputs", ()) if output is not None]
    if outputs and scheduler.config.get("algorithm_type", "").startswith("dpmsolver++"):
        return outputs[-1]
    return scheduler.scale_model_input(latents, timestep)


@torch.no_grad()
def preview(stock: DiffusionPipeline, latents: Tensor) -> list[Image.Image]:
    """Latents as pictures.

    Four channels get rough colours without the VAE: decoding beside a step that is under way needs memory of its own, moves
    parts about where they wait outside, and overflows for SDXL in float16. Storybook's patches are decoded: they are pixels.
    """
    if latents.shape[1] == 4:
        return coloured(latents, isinstance(stock, StableDiffusionXLPipeline), stock.vae_scale_factor)
    pixels = stock.vae.decode(latents.to(stock.vae.dtype) / stock.vae.config.scaling_factor, return_dict=False)[0]
    return stock.image_processor.postprocess(pixels, output_type="pil")


def coloured(latents: Tensor, sdxl: bool, scale: int) -> list[Image.Image]:
    """Latents `(B, 4, h, w)` as pictures, `scale` times as large."""
    pixels = latents.float().cpu().movedim(1, -1) @ torch.tensor(SDXL_COLOURS if sdxl else SD15_COLOURS)
    size = scale * latents.shape[3], scale * latents.shape[2]
    small = ((pixels + 1) * 127.5).clamp(0, 255).byte().numpy()
    return [Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR) for picture in small]
