"""The processes of a run, and a model that is too large for each to hold: divided over them by torch's FSDP2.

Each unit is gathered when it runs and divided again afterwards, so that a GPU holds its share of everything and one unit.
accelerate's launcher says whether to; its plugin for FSDP is not used, for it saves what is frozen too, in a form of its own.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from nested_attention.encoder import QFormer
from nested_attention.errors import spoken_at_exit
from nested_attention.loading import best_device

PATIENCE = timedelta(days=1)  # of those that wait for another one, which may read terabytes of shards through


def this_process() -> PartialState:
    """Which of the run's processes this is. Where there is no GPU, accelerate connects them only if told that they are on a CPU."""
    return PartialState(cpu=best_device().type == "cpu", timeout=PATIENCE)


@contextmanager
def training_command() -> Iterator[None]:
    """For commands that train: errors are said as by `spoken_at_exit`, and at the end the processes of the run part."""
    with spoken_at_exit():
        yield
        part()


def part() -> None:
    """Takes this process out of the run, where there are several; nothing of this process runs after it.

    A thread of gloo may still hold tensors that were sent last, and if it lets go of them while Python is being torn down, the
    process aborts. What ends these threads, dropping the group, is out of reach: torch's caches for divided tensors hold it for good.
    """
    state = this_process()
    if state.num_processes > 1:
        state.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def asked_to_shard() -> bool:
    """Whether the run was launched with `distributed_type: FSDP` (`train/configs/accelerate/fsdp.yaml`), over several processes."""
    return this_process().num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def shard(model: nn.Module, units: list[nn.Module], device: torch.device, processes: int) -> None:
    """Divides `units` of `model`, innermost first, in place; parameters in none of them stay whole on every process."""
    mesh = init_device_mesh(device.type, (processes,))
    divided = {parameter for unit in units for parameter in unit.parameters()}
    whole = {parameter for parameter in model.parameters() if parameter not in divided}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        if isinstance(unit, QFormer):
            register_fsdp_forward_method(unit, "read")
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def synchronize(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass brings the gradients of all processes together; for a model that is divided."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
