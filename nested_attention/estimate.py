"""What a base model would cost on this machine, before anything is fetched or loaded."""

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch

from nested_attention.bases import Base
from nested_attention.errors import NestedAttentionError
from nested_attention.loading import base_folder, best_dtype, few_steps_folder
from nested_attention.memory import LADDER, choose, free_gigabytes, needed

SIDE = 2048  # of the matrices that are multiplied to see how fast the device is
EFFICIENCY = 0.6  # of that speed that a U-Net reaches


@dataclass(frozen=True)
class Estimate:
    """What to expect of a base on a device.

    Attributes:
        fetched: nothing of the base has to be downloaded.
        download: gigabytes of it to download otherwise.
        memory: gigabytes that it takes on the device, with an adapter of full size and a subject.
        placement: how it will be placed there.
        seconds: for one picture with the base's default settings; right to a factor of about two.
    """

    fetched: bool
    download: float
    memory: float
    placement: str
    seconds: float


def estimate(base: Base, device: torch.device) -> Estimate:
    dtype = best_dtype(device)
    adapter = base.adapter_gigabytes * dtype.itemsize / 2
    rung = LADDER[choose(base, free_gigabytes(device) - adapter, device, dtype)]
    seconds = base.steps * base.teraflops / (EFFICIENCY * teraflops_per_second(device))
    download = missing_gigabytes(base)
    return Estimate(download == 0, download, needed(base, rung, dtype) + adapter, rung.name, seconds)


def missing_gigabytes(base: Base) -> float:
    """What of a base would have to be downloaded. Nobody is asked."""
    missing = base.gigabytes
    with suppress(NestedAttentionError):
        base_folder(base, local=True)
        missing = 0.0
    if base.few_steps is not None:
        missing += base.few_steps.gigabytes
        with suppress(NestedAttentionError):
            few_steps_folder(base.few_steps, local=True)
            missing -= base.few_steps.gigabytes
    return missing


@cache
def teraflops_per_second(device: torch.device) -> float:
    """How fast the device multiplies matrices in the dtype that would be used; measured once, in a fraction of a second."""
    a = torch.randn(SIDE, SIDE, device=device).to(best_dtype(device))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        taken.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(taken) / 1e12
