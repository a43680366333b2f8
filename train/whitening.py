"""Learning what tells subjects apart as fast as what they share.

The tokens of different subjects differ by a hundred times as much along some directions as along others, and the fine
differences (which haircut, not: long or short) lie along the others. A gradient of `weight @ token` sees a direction in
proportion to its length, so that `weight` hardly learns what short directions say. AdamW therefore works in coordinates
in which all directions are alike (the input half of K-FAC, Martens & Grosse 2015, arXiv 1503.05671).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

DAMPING = 0.03  # directions with less than this share of the mean energy are noise and stay short


def whitening(inputs: Tensor) -> Tensor:
    """The inverse square root of the second moment of `inputs (n, width)`: `(width, width)`, symmetric."""
    moment = inputs.mT @ inputs / len(inputs)
    energies, directions = torch.linalg.eigh(moment)
    return directions * (energies.clamp(min=0) + DAMPING * energies.mean()).rsqrt() @ directions.mT


class WhitenedAdamW(torch.optim.AdamW):
    """AdamW for weights `(out, in)` of linear layers, as if `white (in, in)` had been applied to what they read."""

    def __init__(self, groups: Iterable[dict], lr: float, betas: tuple[float, float]):
        super().__init__(groups, lr, betas, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure=None):
        before = {}
        for group in self.param_groups:
            for weight in group["params"]:
                before[weight] = weight.clone()
                weight.grad = weight.grad @ group["white"]
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.copy_(before[weight] + (weight - before[weight]) @ group["white"])
