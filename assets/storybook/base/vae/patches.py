"""A thin stand-in for a VAE: pixels rearranged into patches, nothing lost, nothing learned.

Storybook's U-Net works on patches of 8 x 8 pixels (a 16 x 16 grid of 192 channels for 128 x 128 pixels) and predicts
the clean picture, after "Back to Basics: Let Denoising Generative Models Denoise" (arXiv 2511.13720).
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Decoded:
    sample: Tensor


@dataclass
class Exactly:
    """A distribution with nothing left to chance."""

    latents: Tensor

    def mode(self) -> Tensor:
        return self.latents


@dataclass
class Encoded:
    latent_dist: Exactly


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """`decode` and `encode` with the signatures of diffusers' `AutoencoderKL`.

    Pixels `(B, 3, H, W)` in -1..1 <-> latents `(B, 3 * patch^2, H / patch, W / patch)`.
    """

    @register_to_config
    def __init__(self, patch: int = 8, scaling_factor: float = 1.0):
        super().__init__()
        # diffusers derives the latent grid from the number of blocks: patch = 2 ** (blocks - 1)
        self.register_to_config(block_out_channels=[3] * patch.bit_length(), latent_channels=3 * patch**2)
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # gives the module a device and a dtype

    def encode(self, pixels: Tensor) -> Encoded:
        return Encoded(Exactly(F.pixel_unshuffle(pixels, self.config.patch)))

    def decode(self, latents: Tensor, return_dict: bool = True, generator: torch.Generator | None = None):
        pixels = F.pixel_shuffle(latents, self.config.patch)
        return Decoded(pixels) if return_dict else (pixels,)
