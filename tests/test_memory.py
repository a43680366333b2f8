"""The ladder of memory measures: what is chosen, that no rung changes a picture, and that one step down saves a request."""

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nested_attention import Cancelled, NestedAttentionError, NestedAttentionPipeline, trace
from nested_attention.adapters import Adapter, AdapterConfig, cross_attention_layers
from nested_attention.bases import BASES, UNETS
from nested_attention.condition import NestedCondition
from nested_attention.encoder import QFormerConfig
from nested_attention.loading import load_adapters
from nested_attention.memory import DECODE, LADDER, SLICE, TILE, choose, free_gigabytes, needed, settle
from tests import tiny
from tests.tiny import pixels

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.mark.parametrize(("free", "rung"), [(24.0, 0), (10.5, 1), (9.0, 2), (7.0, 3), (0.5, 3)])
def test_the_first_rung_that_fits_is_chosen(free: float, rung: int) -> None:
    assert choose(BASES["sdxl"], free, CUDA, torch.float16) == rung
    assert choose(BASES["sdxl"], 2 * free, CUDA, torch.float32) == rung
    assert choose(BASES["sdxl"], free, CPU, torch.float32) == 0


def test_free_memory_of_a_cpu_is_what_the_system_says() -> None:
    assert 0 < free_gigabytes(CPU) < psutil.virtual_memory().total / 1e9


def test_what_pytorch_keeps_of_a_gpu_for_the_next_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_000_000_000, 8_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3_000_000_000)
    assert free_gigabytes(CUDA) == pytest.approx(4.0)


class Held(TorchDispatchMode):
    """`peak`: the most bytes that what is computed inside held at one time, also on the device "meta", where there are none."""

    now = peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage()
            if not hasattr(storage, "held"):
                storage.held = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(("number", "side"), [(0, 1024), (1, TILE)])
def test_what_decoding_takes_is_that_of_the_real_shapes(number: int, side: int) -> None:
    """Of one picture, or one tile of it, however many pictures there are. Three tensors of five: cuDNN's two cannot be seen here."""
    stock = tiny.stock("sdxl")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2}
    with META:
        stock.vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=4, sample_size=1024, **blocks)
    stock.vae.eval().requires_grad_(False)
    stock.vae_scale_factor = 8
    LADDER[number].place(stock, META)
    with Held() as held:
        assert stock.vae.decode(torch.empty(2, 4, 128, 128, device=META)).sample.shape == (2, 3, 1024, 1024)
    assert held.peak / 1e9 == pytest.approx(3 / 5 * DECODE * side**2, rel=0.15)


def test_a_large_picture_counts_where_it_is_decoded_whole() -> None:
    sdxl, half = BASES["sdxl"], torch.float16
    assert needed(sdxl, LADDER[0], half) == pytest.approx(sdxl.gigabytes + sdxl.subject_gigabytes + 5.37, abs=0.05)
    assert choose(sdxl, 13.0, CUDA, half) == 1 and choose(sdxl, 14.0, CUDA, half) == 0
    assert needed(sdxl, LADDER[0], torch.float32) == pytest.approx(2 * (sdxl.gigabytes + sdxl.subject_gigabytes) + 5.37, abs=0.05)


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


@pytest.mark.parametrize(("name", "sizes"), [("sd15", 3), ("sdxl", 4)])
def test_every_rung_needs_less_than_the_one_before(name: str, sizes: int) -> None:
    """But for SD 1.5, whose pictures are one tile."""
    takes = [needed(BASES[name], rung, torch.float16) for rung in LADDER]
    assert takes == sorted(takes, reverse=True) and len(set(takes)) == sizes


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

    Not the last rung: accelerate's hooks for single layers need a device that is not the CPU. `settle` leaves out the one before, too.
    """
    pipe = tiny.pipeline("sd")
    subject = pipe.encode("cat", tiny.photo(3))
    expected = [pixels(pipe("<cat> on the beach", [subject], seed=seed)) for seed in (3, 4)]
    pipe.turn = threading.Lock()
    pipe.rung = number
    LADDER[number].place(pipe.stock, CPU)
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
    assert len(pipe.cache) == 0
    assert np.abs(found - expected).max() <= 2
    torch.testing.assert_close(maps.subject("<cat>").outer(), whole.subject("<cat>").outer(), atol=1e-4, rtol=1e-3)


def test_a_request_whose_rung_another_left_follows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On a CPU, where requests run beside each other."""
    pipe = tiny.pipeline("sd")
    forward = pipe.stock.unet.forward

    def failing(*args: Any, **kwargs: Any) -> NoReturn:
        pipe.rung = settle(pipe.stock, CPU, 1)  # the other one
        monkeypatch.setattr(pipe.stock.unet, "forward", forward)
        without_room()

    monkeypatch.setattr(pipe.stock.unet, "forward", failing)
    assert len(pipe("a cat on the beach").images) == 1
    assert pipe.rung == 1 and capsys.readouterr().err == ""


def test_a_request_runs_on_the_rung_that_its_turn_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    slices: list[int | None] = []

    def condition(*args: Any) -> NestedCondition:
        made = NestedCondition(*args)
        slices.append(made.slice)
        return made

    @contextmanager
    def turn_behind_another() -> Iterator[None]:
        pipe.rung = settle(pipe.stock, CPU, 1)
        yield

    monkeypatch.setattr("nested_attention.pipeline.NestedCondition", condition)
    pipe.turn = turn_behind_another()
    pipe("a cat on the beach")
    assert slices == [SLICE]


def test_after_one_step_down_the_message_says_what_to_do_and_the_pipeline_stays_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    short_of_memory(pipe, 2, monkeypatch)
    with pytest.raises(NestedAttentionError, match="too little memory for 1 pictures of 32 x 32; ask for fewer"):
        pipe("a cat on the beach")
    assert pipe.rung == 1 and len(pipe("a cat on the beach").images) == 1


def test_a_picture_that_cannot_be_encoded_for_want_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    monkeypatch.setattr(pipe.adapters["cat"].qformer, "read", without_room)
    with pytest.raises(NestedAttentionError, match="too little memory to encode <cat>; close what else uses it"):
        pipe.encode("cat", tiny.photo(3))


def test_an_adapter_that_finds_no_room_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unet = tiny.stock("sd").unet
    tiny.adapter(unet, "cat").save(tmp_path)
    monkeypatch.setattr(Adapter, "to", without_room)
    with pytest.raises(NestedAttentionError, match="cuda has too little memory to hold the adapters for cat; close what else uses it"):
        load_adapters(BASES["sd15"], unet, tmp_path, CUDA)


def test_a_model_that_does_not_fit_goes_down_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = tiny.stock("sd")
    with monkeypatch.context() as patch:  # no room for all of it at once: for the two rungs that need this
        patch.setattr(stock, "enable_model_cpu_offload", without_room)
        patch.setattr("nested_attention.memory.tile", without_room)
        with pytest.raises(NestedAttentionError, match="meta has too little memory even for sequential offload"):
            settle(stock, META, 1)
        patch.undo()
        patch.setattr(stock, "enable_model_cpu_offload", without_room)
        patch.setattr(stock, "enable_sequential_cpu_offload", lambda device: None)
        assert settle(stock, META, 2) == 3


def test_on_a_cpu_nothing_can_wait_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    pipe.rung = settle(pipe.stock, CPU, 1)
    short_of_memory(pipe, 1, monkeypatch)
    with pytest.raises(NestedAttentionError, match="cpu has too little memory for 1 pictures"):
        pipe("a cat on the beach")
    assert pipe.rung == 1 and len(pipe("a cat on the beach").images) == 1
    with pytest.raises(NestedAttentionError, match="cpu has too little memory even for everything on the device, attention in slices"):
        settle(pipe.stock, CPU, 2)


def test_half_a_model_that_only_passes_through_the_machines_memory_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    stock = tiny.stock("sd").to(torch.float16)
    caplog.clear()
    settle(stock, META, 0)
    assert caplog.messages == [] and stock.unet.device == META


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_a_decode_that_fails_leaves_the_vae_as_it_was(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 SDXL's VAE, which all requests share, decodes in float32 and goes back afterwards."""
    pipe = NestedAttentionPipeline(tiny.pipeline("sdxl").base, tiny.stock("sdxl").to(torch.float16), {}, {})
    decode, seen = pipe.stock.vae.decode, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        seen.append(pipe.stock.vae.dtype)
        if len(seen) == 1:
            raise error
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipe.stock.vae, "decode", failing)
    with suppress(KeyboardInterrupt):
        pipe("a cat on the beach")
    assert pipe.stock.vae.dtype == torch.float16
    assert len(pipe("a cat on the beach").images) == 1
    assert set(seen) == {torch.float32} and pipe.stock.vae.dtype == torch.float16


def test_a_request_that_is_cancelled_sends_the_parts_home() -> None:
    pipe = tiny.pipeline("sd")
    LADDER[2].place(pipe.stock, CPU)
    hook = pipe.stock.unet._hf_hook
    with pytest.raises(Cancelled):
        pipe("a cat on the beach", callback=lambda progress: (_ for _ in ()).throw(Cancelled()))
    assert pipe.stock.unet._hf_hook is not hook  # a new one is only given to a part that was moved to the CPU
    assert len(pipe("a cat on the beach").images) == 1
