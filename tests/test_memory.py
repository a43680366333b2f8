"""The ladder of memory measures: what is chosen, that slices change nothing, and that one step down saves a request."""

from dataclasses import replace

import pytest
import torch

from nested_attention import NestedAttentionError, trace
from nested_attention.bases import BASES
from nested_attention.condition import NestedCondition
from nested_attention.memory import LADDER, Rung, choose
from tests import tiny


@pytest.mark.parametrize(("free", "rung"), [(None, 0), (24.0, 0), (8.5, 1), (7.0, 2), (4.0, 3), (0.5, 3)])
def test_the_first_rung_that_fits_is_chosen(free: float | None, rung: int) -> None:
    assert choose(BASES["sdxl"], free) == rung


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
    assert pipe.rung == 1 and "out of memory; from now on" in capsys.readouterr().out
    difference = torch.tensor(list(expected.tobytes()), dtype=torch.float) - torch.tensor(list(found.tobytes()), dtype=torch.float)
    assert difference.abs().max() <= 2
    torch.testing.assert_close(maps.subject("<cat>").outer(), whole.subject("<cat>").outer(), atol=1e-4, rtol=1e-3)


def test_at_the_end_of_the_ladder_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd")
    pipe.rung = len(LADDER) - 1
    short_of_memory(pipe, monkeypatch, 1)
    with pytest.raises(NestedAttentionError, match="too little memory for 1 pictures of 32 x 32; ask for fewer"):
        pipe("a cat on the beach")
