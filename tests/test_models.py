"""The place where base and adapter are chosen: what is offered, what is said of each, and what becomes of the choice."""

import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch

from nested_attention import NestedAttentionError
from nested_attention.adapters import CONFIG, WEIGHTS
from nested_attention.bases import BASES
from nested_attention.estimate import Estimate
from nested_attention.released import LICENCE, REPO
from nested_attention.ui.handlers import Handlers
from nested_attention.ui.models import OWN, cost_text, described, loaded_text, local_adapters, spoken_time, use_model
from nested_attention.ui.session import SESSION_SECONDS
from nested_attention.ui.studio import Studio
from tests import tiny
from tests.hub_server import HubServer, visit
from tests.page import ANYBODY, values


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Studio:
    """With a cat's adapter in `runs` and 64 GB of free memory; nothing was ever fetched, and the Hub is away."""
    monkeypatch.setattr("nested_attention.estimate.free_gigabytes", lambda device: 64.0)
    with HubServer("token") as gone:
        visit(gone, monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    pipe = tiny.pipeline("sd")
    pipe.adapters["cat"].save(Path("runs/adapter-cat/adapter"))
    return Studio(pipe)


def test_adapters_that_were_trained_or_converted_here_are_offered(studio: Studio) -> None:
    assert local_adapters() == ["runs/adapter-cat/adapter"]
    studio.pipe.adapters["person"].save(Path("runs/released"))
    assert local_adapters() == ["runs/adapter-cat/adapter", "runs/released"]


def test_what_is_chosen_is_described(studio: Studio) -> None:
    said, problem = described(studio, "storybook", OWN)
    assert problem == "" and said.startswith("**storybook** · licence MIT · on this machine · ") and "on cpu" in said
    for kind in ("cat", "person", "vehicle"):
        size = (BASES["storybook"].adapters / kind / WEIGHTS).stat().st_size  # type: ignore[operator]
        assert f"{kind}, {size / 1e6:.0f} MB, for storybook, licence MIT" in said
    assert "Adapter: cat, 0 MB, for tiny, licence MIT." in described(studio, "storybook", "runs/adapter-cat/adapter")[0]


def test_what_has_to_be_fetched_is_said_with_its_licence(studio: Studio) -> None:
    assert "**6.9 GB to download**" in described(studio, "sdxl", OWN)[0]
    said, _ = described(studio, "sdxl", REPO)
    assert "licence CreativeML Open RAIL++-M · **10.3 GB to download**" in said
    assert f"Adapter: person, for sdxl, licence {LICENCE} (not for commercial use)." in said
    assert "licence stands on its page on the Hub" in described(studio, "sdxl", "me/cat")[0]
    assert "It brings no adapter" in described(studio, "sdxl", OWN)[0]


def test_what_cannot_be_chosen_is_said(studio: Studio) -> None:
    assert described(studio, "flux", OWN)[1].startswith("⚠️ there is no base model called 'flux'")
    said, problem = described(studio, "storybook", "runs/adapter-dog/adapter")
    assert said == "" and problem.startswith("⚠️ runs/adapter-dog/adapter/config.json is missing")
    long = "x" * 5000
    assert described(studio, long, OWN)[1].startswith("⚠️ there is no base model called 'xxx")
    assert all("is not an adapter" in described(studio, "storybook", adapter)[1] for adapter in (long, f"me/{long}"))
    assert described(studio, f"me/base@{long}", f"me/cat@{long}")[1] == ""  # only the Hub knows


def test_spaces_around_a_name_are_no_part_of_it(studio: Studio) -> None:
    assert described(studio, " storybook ", "me/cat\n") == described(studio, "storybook", "me/cat")
    assert "there is no base model called ''" in described(studio, None, OWN)[1]  # the field is empty


def test_costs_in_words(studio: Studio) -> None:
    assert cost_text(Estimate(True, 0.0, 2.04, "whole", 100.0, 16.0), studio.pipe) == (
        "on this machine · 2.0 GB of memory · on cpu, whole, about 2 min a picture"
    )
    assert cost_text(Estimate(False, 6.94, 9.0, "in parts", 9000.0, 16.0), studio.pipe).startswith("**6.9 GB to download** · 9.0 GB")
    assert "9.0 GB of memory, ⚠️ **of which only 6.5 GB are free** · on" in cost_text(Estimate(True, 0, 9.0, "whole", 9.0, 6.5), studio.pipe)
    assert [spoken_time(seconds) for seconds in (0.2, 3.4, 240.0)] == ["1 s", "3 s", "4 min"]


def test_what_is_in_use_is_said(studio: Studio) -> None:
    said = loaded_text(studio.pipe)
    assert said == "In use: **tiny** on cpu in float32, licence CreativeML Open RAIL-M. Adapters: person (MIT), cat (MIT)."
    studio.pipe.adapters.clear()  # type: ignore[attr-defined]
    assert loaded_text(studio.pipe).endswith("Adapters: none.")


def test_the_chosen_model_is_loaded_and_what_cannot_be_changes_nothing(studio: Studio, tmp_path: Path) -> None:
    tiny.stock("sd").save_pretrained(tmp_path / "base")
    load = use_model(studio, lambda pipe, *before: [pipe.kinds, *before], 2)
    begun, done = load(str(tmp_path / "base"), "runs/adapter-cat/adapter", ANYBODY, "before")
    assert begun[:2] == ["Loading; the first time it is downloaded …", ""] and begun[2:] == [gr.skip()] * 2
    assert f"**{tmp_path / 'base'}**" in done[0] and "Adapters: cat (MIT)." in done[0] and done[1:] == ["", ("cat",), "before"]
    pipe = studio.session("anybody").pipe
    assert pipe is not studio.pipe and pipe.stock.unet.dtype in (torch.float32, torch.bfloat16)
    for name, adapter, words in (
        (str(tmp_path / "base"), "runs/adapter-cat/adapter", ""), ("somebody/else", OWN, "the Hub cannot be reached"),
        (str(tmp_path / "base"), "runs/adapter-dog/adapter", "runs/adapter-dog"),
    ):  # fmt: skip
        *_, kept = load(name, adapter, ANYBODY, "before")
        assert words in kept[1] and kept[0] == done[0] and kept[2:] == [gr.skip()] * 2  # what was set on the page stays
        assert studio.session("anybody").pipe is pipe
    (damaged := tmp_path / "runs/adapter-cow/adapter").mkdir(parents=True)
    (damaged / CONFIG).write_bytes((tmp_path / "runs/adapter-cat/adapter" / CONFIG).read_bytes())
    (damaged / WEIGHTS).write_bytes(b"no weights")
    *_, broken = load(str(tmp_path / "base"), "runs/adapter-cow/adapter", ANYBODY, "before")
    assert "runs/adapter-cow" in broken[1] and studio.session("anybody").pipe is studio.pipe  # the other one had to go to load this
    assert loaded_text(studio.pipe) == broken[0] and broken[2:] == [studio.pipe.kinds, "before"]


def test_a_cpu_is_not_asked_for_more_memory_than_it_has(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nested_attention.estimate.free_gigabytes", lambda device: 4.0)
    with pytest.raises(
        NestedAttentionError, match=r"sdxl would take .* GB of memory here, of which only 4\.0 GB are free; choose a smaller"
    ):
        studio.choose_model("anybody", "sdxl", None)
    assert studio.session("anybody").pipe is studio.pipe


def test_a_visitor_who_comes_back_has_their_model_or_is_told(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.stock("sd").save_pretrained(base := tmp_path / "base")
    cat, handlers, now = "runs/adapter-cat/adapter", Handlers(studio, []), time.monotonic()
    chosen = studio.choose_model("anybody", str(base), cat)

    def much_later() -> None:
        nonlocal now
        now += 2 * SESSION_SECONDS
        monkeypatch.setattr("nested_attention.ui.session.time", SimpleNamespace(monotonic=lambda: now))
        studio.purge()

    much_later()
    session = studio.session("anybody")
    assert session.pipe is chosen and session.lost is None
    studio.choose_model("stranger", str(base), None)  # takes its place
    much_later()
    *_, told = handlers.generate(ANYBODY, *values(prompt="a tree"))
    assert f"{base} had to go while you were away, and tiny is in use again" in told[2]
    *_, last = handlers.generate(ANYBODY, *values(prompt="a tree"))
    assert "Done" in last[1]  # said once
    much_later()
    assert studio.session("anybody").lost == str(base)  # which is what the page still shows
    studio.choose_model("anybody", "tiny", None)
    much_later()
    assert studio.session("anybody").lost is None
