"""Muon for matrices and convolution kernels, AdamW for the rest, in white coordinates where a task gives them.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, then the nearest semi-orthogonal
matrix by five Newton-Schulz steps, scaled so that an update has the root mean square of an AdamW update
(Liu et al. 2025, arXiv 2502.16982). `torch.optim.Muon` takes 2-D parameters only; here kernels count as matrices.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nested_attention.loading import computes_bfloat16
from train.whitening import WhitenedAdamW

BETAS = 0.9, 0.98


def orthogonalized(batch: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to each of `batch (n, rows, columns)`, approximately."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = batch.shape[1] <= batch.shape[2]
    x = (batch if wide else batch.mT).to(torch.bfloat16 if computes_bfloat16(batch.device) else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(batch.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum 0.95 with Nesterov; parameters of one shape are treated in one batch."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape[0], parameter[0].numel()].append(parameter)
            for (rows, columns), parameters in shapes.items():
                ahead = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    ahead.append(parameter.grad.lerp(buffer, group["momentum"]).reshape(rows, columns))
                updates = orthogonalized(torch.stack(ahead))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def build_optimizers(
    model: nn.Module, lr: float, muon_lr: float, not_muon: tuple[str, ...], white: Mapping[str, Tensor], white_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for every trainable matrix or kernel, except names that contain one of `not_muon`; AdamW for the others.

    With `muon_lr` 0 everything goes to AdamW. Weights named in `white` always do, in the coordinates given there.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    whitened: list[dict] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in white:
            whitened.append({"params": [parameter], "white": white[name].to(parameter.device)})
        elif parameter.requires_grad:
            muon = muon_lr > 0 and parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1
            (matrices if muon and not any(part in name for part in not_muon) else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, muon_lr))
    if whitened:
        optimizers.append(WhitenedAdamW(whitened, white_lr, BETAS))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr, BETAS, weight_decay=0.01))
    return optimizers
