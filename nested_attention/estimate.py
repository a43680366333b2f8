"""What a base model would cost on this machine, before anything is fetched or loaded."""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from nested_attention.bases import Base
from nested_attention.hub import is_here
from nested_attention.loading import best_dtype
from nested_attention.memory import LADDER, WORKING, choose, free_gigabytes

SIDE = 2048  # of the matrices that are multiplied to see how fast the device is
EFFICIENCY = 0.6  # of that speed that a U-Net reaches


@dataclass(frozen=True)
class Estimate:
    """What to expect of a base on a device.

    Attributes:
        fetched: nothing has to be downloaded.
        download: gigabytes to download otherwise.
        memory: gigabytes that it takes on the device.
        placement: how it will be placed there.
        seconds: for one picture with the base's default settings; right to a factor of about two.
    """

    fetched: bool
    download: float
    memory: float
    placement: str
    seconds: float


def estimate(base: Base, device: torch.device) -> Estimate:
    rung = LADDER[choose(base, free_gigabytes(device))]
    seconds = base.steps * base.teraflops / (EFFICIENCY * teraflops_per_second(device))
    fetched = Path(base.source).is_dir() or is_here(base.source, base.revision)
    return Estimate(fetched, base.gigabytes, base.gigabytes * (rung.share + WORKING), rung.name, seconds)


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
