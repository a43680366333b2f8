"""The ladder of memory measures: what is chosen, that no rung changes a picture, and that one step down saves a request."""

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import UNet2DConditionModel

from nested_attention import NestedAttentionError, trace
from nested_attention.adapters import Adapter, AdapterConfig, cross_attention_layers
from nested_attention.bases import BASES
from nested_attention.bench.step import SCALES
from nested_attention.condition import NestedCondition
from nested_attention.encoder import QFormerConfig
from nested_attention.memory import LADDER, Rung, choose, free_gigabytes
from tests import tiny

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
    sizes = QFormerConfig(1024, 1280, 4, 20, 64, 1280, SCALES[name]["cross_attention_dim"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SCALES[name])
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
    unet, states = pipe.stock.unet, torch.randn(2, 24, pipe.stock.unet.config.cross_attention_dim)
    subject = pipe.encode("cat", tiny.photo(3), "<cat>")
    columns = torch.zeros(1, 24)
    columns[0, 4] = 1
    layers = {name: [layer] for name, layer in subject.layer_subjects(columns).items()}
    added = {"text_embeds": torch.randn(2, tiny.WIDTH), "time_ids": torch.ones(2, 6)} if architecture == "sdxl" else None
    latents = torch.randn(2, 4, 16, 16)

    def step(condition: NestedCondition) -> torch.Tensor:
        return unet(latents, 500, states, added_cond_kwargs=added, cross_attention_kwargs={"nested": condition}).sample

    with torch.no_grad():
        whole, sliced = step(NestedCondition(1, layers)), step(NestedCondition(1, layers, slice=7))
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


def short_of_memory(pipe, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The pipeline's run fails `times` times after two steps, as a GPU does; measures are taken on the CPU."""
    run, left = pipe._run, [times]

    def failing(settings, text, condition, callback):
        if not left[0]:
            return run(settings, text, condition, callback)
        left[0] -= 1
        run(replace(settings, steps=2), text, condition, None)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe, "_run", failing)
    nothing = [Rung(rung.name, rung.share, rung.slice, lambda stock, device: None) for rung in LADDER]
    monkeypatch.setattr("nested_attention.pipeline.LADDER", nothing)


def test_one_step_down_saves_the_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pipe = tiny.pipeline("sd")
    subject = pipe.encode("cat", tiny.photo(3))
    with trace(pipe) as whole:
        expected = pipe("<cat> on the beach", [subject], seed=3).images[0]
    short_of_memory(pipe, monkeypatch, 1)
    with trace(pipe) as maps:
        found = pipe("<cat> on the beach", [subject], seed=3).images[0]
    assert pipe.rung == 1 and "out of memory; from now on" in capsys.readouterr().err
    difference = torch.tensor(list(expected.tobytes()), dtype=torch.float) - torch.tensor(list(found.tobytes()), dtype=torch.float)
    assert difference.abs().max() <= 2
    torch.testing.assert_close(maps.subject("<cat>").outer(), whole.subject("<cat>").outer(), atol=1e-4, rtol=1e-3)


def test_at_the_end_of_the_ladder_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    pipe.rung = len(LADDER) - 1
    short_of_memory(pipe, monkeypatch, 1)
    with pytest.raises(NestedAttentionError, match="too little memory for 1 pictures of 32 x 32; ask for fewer"):
        pipe("a cat on the beach")
