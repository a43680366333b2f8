"""What a base and an adapter would cost on this machine: memory in the dtype it computes in, placement, seconds, download."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from nested_attention import NestedAttentionError
from nested_attention import estimate as module
from nested_attention.bases import BASES, unet_settings
from nested_attention.bench.step import SCALES, Bench
from nested_attention.estimate import IMAGE_ENCODER, estimate, teraflops_per_second
from nested_attention.hub import commit_of, fetch
from nested_attention.memory import DECODE, LADDER
from nested_attention.released import REPO, converted
from tests import tiny
from tests.hub_server import HubServer, visit

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
    assert on_cpu.memory == pytest.approx(2 * (sdxl.gigabytes + beside) + DECODE * sdxl.size**2)
    assert on_cpu.placement == LADDER[0].name
    assert on_gpu.memory == pytest.approx(sdxl.gigabytes * (LADDER[3].share + 0.25) + beside)
    assert on_gpu.placement == LADDER[3].name  # 9 GB would do for one part at a time, but for the adapter
    assert on_gpu.free == on_cpu.free == 9.0 and on_gpu.fits and not on_cpu.fits


def test_seconds_and_download() -> None:
    cost = estimate(replace(BASES["sdxl"], source="nobody/nothing"), CPU)
    assert cost.seconds == pytest.approx(30 * 13.5 / 6)
    assert (cost.fetched, cost.download) == (False, BASES["sdxl"].gigabytes)
    shipped = estimate(BASES["storybook"], CPU)
    assert (shipped.fetched, shipped.download) == (True, 0.0)


def test_what_comes_to_the_device_layer_by_layer_takes_its_time() -> None:
    sdxl = BASES["sdxl"]
    unet = LADDER[2].share * sdxl.gigabytes  # in 16 bit
    assert estimate(sdxl, CUDA).seconds == pytest.approx(30 * (13.5 / 6 + unet / 6))


def test_an_adapter_and_its_image_encoder_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storybook, sdxl = BASES["storybook"], replace(BASES["sdxl"], source="nobody/nothing")
    made = tiny.adapter(tiny.stock("sd").unet, "cat")
    made.save(tmp_path / "local")
    made.config = replace(made.config, image_encoder="somebody/eyes", image_revision=None)
    made.save(tmp_path / "adapter")
    with HubServer("token") as hub:
        visit(hub, monkeypatch, tmp_path / "home")
        for name in (REPO, "me/cat"):
            missing = estimate(sdxl, CPU, name).download
            assert missing == pytest.approx(sdxl.gigabytes + sdxl.adapter_gigabytes + IMAGE_ENCODER)
        assert hub.requests == []
        hub.publish("me/cat", {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()})
        hub.publish("somebody/eyes", {"config.json": b"{}", "model.safetensors": b"eyes"})
        fetch("me/cat", None, ["*"])
        eyes = 2 * storybook.subject_gigabytes
        for name, missing in (("me/cat", eyes), (str(tmp_path / "adapter"), eyes), (str(tmp_path / "local"), 0.0)):
            assert estimate(storybook, CPU, name).download == pytest.approx(missing)
        fetch("somebody/eyes", commit_of("somebody/eyes"), ["*"])
        assert estimate(storybook, CPU, "me/cat").fetched
        commit = hub.publish(REPO, {})
        assert commit_of(REPO) == commit and not estimate(storybook, CPU, REPO).fetched
    made.save(converted(commit))
    assert estimate(storybook, CPU, REPO).fetched
    with pytest.raises(NestedAttentionError, match=r"nothing/config\.json is missing"):
        estimate(storybook, CPU, str(tmp_path / "nothing"))


def test_the_speed_is_measured() -> None:
    assert 0 < teraflops_per_second(CPU) < 1000


@pytest.mark.parametrize("scale", SCALES)
def test_the_work_of_a_step_is_what_torch_counts(scale: str) -> None:
    with torch.device("meta"):
        bench = Bench(UNet2DConditionModel.from_config(unet_settings(scale)))
        with FlopCounterMode(display=False) as counter:
            bench.step()
    assert counter.get_total_flops() / 1e12 == pytest.approx(BASES[scale].teraflops, rel=0.05)
