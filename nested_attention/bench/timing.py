"""How long something takes on the device."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def wait_for_device() -> None:
    """Until it has done what it was told so far; a CPU always has."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Of one go, until the device is through with it."""
    wait_for_device()
    start = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - start


def median_seconds(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median duration of each after one warm-up; they take turns, so that a slow moment of the machine meets all."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            seconds = seconds_of(work)
            if number:
                taken[name].append(seconds)
    return {name: statistics.median(times) for name, times in taken.items()}
