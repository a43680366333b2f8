"""The ladder of memory measures: what is chosen, that no rung changes a picture, and that one step down saves a request."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import UNet2DConditionModel

from nested_attention import NestedAttentionError, NestedAttentionPipeline, trace
from nested_attention.adapters import Adapter, AdapterConfig, cross_attention_layers
from nested_attention.bases import BASES, UNETS
from nested_attention.condition import NestedCondition
from nested_attention.encoder import QFormerConfig
from nested_attention.memory import LADDER, choose, free_gigabytes, settle
from tests import tiny
from tests.tiny import pixels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("free", "rung"), [(24.0, 0), (10.0, 1), (9.0, 2), (7.0, 3), (0.5, 3)])
def test_the_first_rung_that_fits_is_chosen(free: float, rung: int) -> None:
    assert choose(BASES["sdxl"], free, CUDA, torch.float16) == rung
    assert choose(BASES["sdxl"], 2 * free, CUDA, torch.float32) == rung
    assert choose(BASES["sdxl"], free, CPU, torch.float32) == 0


def test_free_memory_of_a_cpu_is_what_the_system_says() -> None:
    assert 0 < free_gigabytes(CPU) < psutil.virtual_memory().total / 1e9


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_sizes_of_adapters_and_subjects_are_those_of_the_released_shape(name: str) -> None:
    """In 16 bit: an adapter of 1024 tokens; and CLIP ViT-H's 632 million weights with the keys and values of one picture."""
    sizes = QFormerConfig(1024, 1280, 4, 20, 64, 1280, UNETS[name]["cross_attention_dim"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
        adapter = Adapter(AdapterConfig("person", "person", name, "", qformer=sizes), unet)
    weights = sum(parameter.numel() for parameter in adapter.parameters())
    cache = sum(2 * sizes.num_tokens * attention.to_k.out_features for attention in cross_attention_layers(unet).values())
    assert BASES[name].adapter_gigabytes == pytest.approx(2 * weights / 1e9, abs=0.05)
    assert BASES[name].subject_gigabytes == pytest.approx(2 * (632e6 + cache) / 1e9, abs=0.05)


def test_every_rung_needs_less_than_the_one_before() -> None:
    shares = [rung.share for rung in LADDER]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_slices_change_nothing(architecture: str) -> None:
    pipe = tiny.pipeline(architecture)
    layers = tiny.layers([pipe.encode("cat", tiny.photo(3))])
    whole, sliced = (tiny.step(pipe, NestedCondition(1, layers, slice=size)) for size in (None, 7))
    torch.testing.assert_close(whole, sliced, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_parts_that_take_turns_draw_the_same_picture_and_previews_leave_them(architecture: str) -> None:
    """With the real hooks, on a CPU: the U-Net's is called once a step, so no part is sent out in the middle of a step."""
    pipe = tiny.pipeline(architecture)
    subject = pipe.encode("cat", tiny.photo(3))
    expected = pipe("<cat> on the beach", [subject], seed=3).images[0]
    pipe.rung = next(number for number, rung in enumerate(LADDER) if rung.name.startswith("model offload"))
    LADDER[pipe.rung].place(pipe.stock, CPU)
    assert isinstance(pipe.stock.vae._hf_hook, CpuOffload) and isinstance(pipe.stock.unet._hf_hook, CpuOffload)
    seen: list = []
    pipe.stock.vae.decoder.register_forward_pre_hook(lambda *_: seen.append("decoded"))

    def look(progress) -> None:
        seen.append(progress.previews()[0].size)

    found = pipe("<cat> on the beach", [subject], seed=3, callback=look).images[0]
    assert seen == [(32, 32)] * pipe.base.steps + ["decoded"]
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("number", range(3))
def test_a_rung_draws_the_same_picture_for_two_at_once(number: int) -> None:
    """With the real hooks, on a CPU. Requests take turns as on a GPU, else the parts of one would be moved under the other.

    Not the last rung: accelerate's hooks for single layers need a device that is not the CPU.
    """
    pipe = tiny.pipeline("sd")
    subject = pipe.encode("cat", tiny.photo(3))
    expected = [pixels(pipe("<cat> on the beach", [subject], seed=seed)) for seed in (3, 4)]
    pipe.turn = threading.Lock()
    pipe.rung = settle(pipe.stock, CPU, number)
    assert pipe.rung == number
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda seed: pixels(pipe("<cat> on the beach", [subject], seed=seed)), (3, 4)))
    assert np.abs(np.subtract(found, expected)).max() <= 1


def without_room(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("MPS backend out of memory (MPS allocated: 5.50 GB, max allowed: 6.80 GB).")


def short_of_memory(pipe: NestedAttentionPipeline, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The U-Net lacks memory `times` times, after two steps each, as on a GPU."""
    forward, calls = pipe.stock.unet.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in range(3, 3 * times + 1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.stock.unet, "forward", failing)


def test_one_step_down_saves_the_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pipe = tiny.pipeline("sd")
    subject = pipe.encode("cat", tiny.photo(3))
    with trace(pipe) as whole:
        expected = pixels(pipe("<cat> on the beach", [subject], seed=3))
    short_of_memory(pipe, 1, monkeypatch)
    with trace(pipe) as maps:
        found = pixels(pipe("<cat> on the beach", [subject], seed=3))
    assert pipe.rung == 1 and capsys.readouterr().err == f"tiny: out of memory; from now on {LADDER[1].name}\n"
    assert np.abs(found - expected).max() <= 2
    torch.testing.assert_close(maps.subject("<cat>").outer(), whole.subject("<cat>").outer(), atol=1e-4, rtol=1e-3)


def test_after_one_step_down_the_message_says_what_to_do_and_the_pipeline_stays_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    short_of_memory(pipe, 2, monkeypatch)
    with pytest.raises(NestedAttentionError, match="too little memory for 1 pictures of 32 x 32; ask for fewer"):
        pipe("a cat on the beach")
    assert pipe.rung == 1 and len(pipe("a cat on the beach").images) == 1


def test_a_picture_that_cannot_be_encoded_for_want_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    monkeypatch.setattr(pipe.adapters["cat"].qformer, "forward", without_room)
    with pytest.raises(NestedAttentionError, match="too little memory to encode <cat>; close what else uses it"):
        pipe.encode("cat", tiny.photo(3))


def test_a_model_that_does_not_fit_goes_down_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = tiny.stock("sd")
    with monkeypatch.context() as patch:  # no room for all of it at once: for the two rungs that need this
        patch.setattr(stock, "enable_model_cpu_offload", without_room)
        patch.setattr("nested_attention.memory.tile", without_room)
        with pytest.raises(NestedAttentionError, match="cpu has too little memory even for sequential offload"):
            settle(stock, CPU, 1)
        patch.undo()
        patch.setattr(stock, "enable_model_cpu_offload", without_room)
        assert settle(stock, CPU, 2) == 3
