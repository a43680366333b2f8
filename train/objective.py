"""The diffusion loss, as the base model's scheduler defines it."""

from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

MIN_SIGMA = 0.2  # below this noise level the velocity's weight 1 / s^2 stops growing


@dataclass(frozen=True)
class FlowObjective:
    """A straight path between picture and noise, `x_s = (1 - s) x + s e`; the model predicts the clean picture `x`.

    The error is the velocity's: `|x' - x|^2 / s^2` ("Back to Basics", arXiv 2511.13720).
    """

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """`clean`, `noise (B, C, H, W)`; `level (B,)` in 0..1."""
        sigma = level[:, None, None, None]
        return (1 - sigma) * clean + sigma * noise

    def timesteps(self, level: Tensor) -> Tensor:
        """What the U-Net is told about the noise."""
        return (level * 1000).floor()

    def error(self, predicted: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Squared error of every element, `(B, C, H, W)`."""
        return (predicted - clean).square() / level.clamp(min=MIN_SIGMA)[:, None, None, None] ** 2


def flow_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler that belongs to `FlowObjective`."""
    return DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++", solver_order=2,
        timestep_spacing="linspace", final_sigmas_type="zero",
    )  # fmt: skip


def weighted_mean(error: Tensor, weights: Tensor) -> Tensor:
    """Mean of `error (B, C, H, W)` with pixel weights `(B, H, W)` of mean 1."""
    return (error.mean(1) * weights).mean()


def empty_where(dropped: Tensor, input_ids: Tensor, empty: Tensor) -> Tensor:
    """Token ids with the rows in `dropped (B,)` replaced by the empty caption's."""
    return torch.where(dropped[:, None], empty, input_ids)
