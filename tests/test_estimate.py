"""What a base would cost on this machine: memory in the dtype it computes in, placement, seconds."""

from dataclasses import replace

import pytest
import torch

from nested_attention import estimate as module
from nested_attention.bases import BASES
from nested_attention.estimate import estimate, teraflops_per_second
from nested_attention.memory import LADDER

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 TFLOP/s, 9 GB free, float32 on the CPU."""
    monkeypatch.setattr(module, "teraflops_per_second", lambda device: 10.0)
    monkeypatch.setattr(module, "free_gigabytes", lambda device: 9.0)
    monkeypatch.setattr(module, "best_dtype", lambda device: torch.float32 if device == CPU else torch.float16)


def test_memory_counts_what_works_beside_the_base_in_the_dtype_that_is_used() -> None:
    sdxl = BASES["sdxl"]
    on_cpu, on_gpu = estimate(sdxl, CPU), estimate(sdxl, CUDA)
    beside = sdxl.adapter_gigabytes + sdxl.subject_gigabytes
    assert on_cpu.memory == pytest.approx(2 * (1.25 * sdxl.gigabytes + beside))
    assert on_cpu.placement == LADDER[0].name
    assert on_gpu.memory == pytest.approx(sdxl.gigabytes * (LADDER[3].share + 0.25) + beside)
    assert on_gpu.placement == LADDER[3].name  # 9 GB would do for one part at a time, but for the adapter


def test_seconds_and_download() -> None:
    cost = estimate(replace(BASES["sdxl"], source="nobody/nothing"), CPU)
    assert cost.seconds == pytest.approx(30 * 25 / 6)
    assert (cost.fetched, cost.download) == (False, BASES["sdxl"].gigabytes)
    shipped = estimate(BASES["storybook"], CPU)
    assert (shipped.fetched, shipped.download) == (True, 0.0)


def test_the_speed_is_measured() -> None:
    assert 0 < teraflops_per_second(CPU) < 1000
