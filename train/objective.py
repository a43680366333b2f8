"""The diffusion loss, as a base model's scheduler defines it, and what chance decides about a sample."""

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from nested_attention.errors import NestedAttentionError

MIN_SIGMA = 0.2  # below this noise level the velocity's weight 1 / s^2 stops growing


class Objective(Protocol):
    """How a picture is mixed with noise, and how far a prediction misses. Levels are in 0 (clean) .. 1 (noise), `(B,)`."""

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """`clean`, `noise (B, C, H, W)` mixed."""
        ...

    def timesteps(self, level: Tensor) -> Tensor:
        """What the U-Net is told about the noise, `(B,)`."""
        ...

    def error(self, predicted: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Squared error of every element, `(B, C, H, W)`."""
        ...


@dataclass(frozen=True)
class FlowObjective:
    """A straight path between picture and noise, `x_s = (1 - s) x + s e`; the model predicts the clean picture `x`.

    The error is the velocity's: `|x' - x|^2 / s^2` ("Back to Basics", arXiv 2511.13720).
    """

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        sigma = level[:, None, None, None]
        return (1 - sigma) * clean + sigma * noise

    def timesteps(self, level: Tensor) -> Tensor:
        return (level * 1000).floor()

    def error(self, predicted: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return (predicted - clean).square() / level.clamp(min=MIN_SIGMA)[:, None, None, None] ** 2


@dataclass(frozen=True)
class NoiseObjective:
    """The objective of Stable Diffusion and SDXL: the model predicts the noise, or with "v_prediction" the velocity.

    `alphas_cumprod (T,)` falls from 1 to about 0 (DDPM, arXiv 2006.11239).
    """

    alphas_cumprod: Tensor
    prediction_type: str

    def timesteps(self, level: Tensor) -> Tensor:
        return (level * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of picture and noise, each `(B, 1, 1, 1)`."""
        alpha = self.alphas_cumprod.to(level.device)[self.timesteps(level)][:, None, None, None]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        signal, sigma = self.scales(level)
        return signal * clean + sigma * noise

    def error(self, predicted: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        signal, sigma = self.scales(level)
        target = signal * noise - sigma * clean if self.prediction_type == "v_prediction" else noise
        return (predicted - target).square()


def objective_of(scheduler: SchedulerMixin) -> Objective:
    """The objective that a base model was trained with.

    Raises:
        NestedAttentionError: its scheduler tells of one that is not known here.
    """
    prediction = scheduler.config.prediction_type
    if prediction == "sample" and scheduler.config.get("use_flow_sigmas"):
        return FlowObjective()
    if prediction in ("epsilon", "v_prediction"):
        return NoiseObjective(scheduler.alphas_cumprod, prediction)
    raise NestedAttentionError(
        f"this base model predicts {prediction!r}, which training does not know; choose one that predicts noise or velocity."
    )


@dataclass(frozen=True)
class Diffusion:
    """What chance decides about one training sample, drawn from its index alone.

    Noise levels are uniform in 0..1, or `sigmoid(N(noise_mean, noise_std))` where these are given.
    """

    noise_mean: float | None = None
    noise_std: float = 1.0
    drop_caption: float = 0.0

    def draw(self, index: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        if self.noise_mean is None:
            level = torch.rand((), generator=generator)
        else:
            level = (torch.randn((), generator=generator) * self.noise_std + self.noise_mean).sigmoid()
        return {
            "level": level,
            "noise": torch.randn(shape, generator=generator),
            "drop": torch.rand((), generator=generator) < self.drop_caption,
        }


def flow_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler that belongs to `FlowObjective`."""
    return DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++", solver_order=2,
        timestep_spacing="linspace", final_sigmas_type="zero",
    )  # fmt: skip


def weighted_mean(error: Tensor, weights: Tensor) -> Tensor:
    """Mean of `error (B, C, H, W)` with weights of mean 1, `(B, H, W)` or one for every element."""
    return (error * (weights if weights.ndim == error.ndim else weights[:, None])).mean()


def empty_where(dropped: Tensor, input_ids: Tensor, empty: Tensor) -> Tensor:
    """Token ids with the rows in `dropped (B,)` replaced by the empty caption's."""
    return torch.where(dropped[:, None], empty, input_ids)
