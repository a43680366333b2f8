"""A model that is too large for every process to hold: divided over them by torch's FSDP2.

Each unit is gathered when it runs and divided again afterwards, so that a GPU holds its share of everything and one unit.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: nn.Module, units: list[nn.Module], device: torch.device, processes: int) -> None:
    """Divides `units` of `model`, innermost first, in place; parameters in none of them stay whole on every process."""
    mesh = init_device_mesh(device.type, (processes,))
    divided = {parameter for unit in units for parameter in unit.parameters()}
    whole = {parameter for parameter in model.parameters() if parameter not in divided}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def synchronize(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass brings the gradients of all processes together; for a model that is divided."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
