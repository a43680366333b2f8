"""Pictures that are dropped back onto the page."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np

from nested_attention import NestedAttentionPipeline
from nested_attention.provenance import read_provenance
from nested_attention.ui.controls import CONTROLS
from nested_attention.ui.examples import Example
from nested_attention.ui.handlers import Handlers
from nested_attention.ui.session import Result
from nested_attention.ui.slots import VALUES, Slot
from nested_attention.ui.studio import Studio, provenances
from tests import tiny
from tests.page import ANYBODY, OPENED, PROMPT, drawn, pixels, read, sent


def test_a_dropped_picture_fills_the_page_so_that_it_is_drawn_again(handlers: Handlers, photos: list[str]) -> None:
    slots = Slot("cat", (photos[0],), 0.8), Slot("person", (photos[1],), framing="crop", crop=(0.1, 0.0, 0.9, 1.0))
    made = drawn(handlers, *slots, prompt="<person> and <cat>", guidance=1.5, lam=0.7)
    *filled, opened, told, _ = handlers.restore(made.files[1], ANYBODY)
    assert told == "Settings restored." and opened == [0, 1]
    handlers.studio.session("anybody").result = None
    *_, last = handlers.generate(ANYBODY, *sent(filled))
    assert np.array_equal(pixels(last[0][0]), pixels(made.files[1]))


def test_a_dropped_picture_clears_what_it_does_not_use_and_takes_the_slots_names(handlers: Handlers, photos: list[str]) -> None:
    studio, session = handlers.studio, handlers.studio.session("anybody")
    ada = studio.encode(session, studio.pipe, Slot("person", (photos[0],)), "<ada>")
    bob = studio.encode(session, studio.pipe, Slot("person", (photos[1],)), "<person>")
    with session.running() as run:
        *_, made = studio.generate(session, run, studio.pipe, "<Ada> and <person>", [ada, bob], steps=2, seed=1)
    assert isinstance(made, Result)
    filled = handlers.restore(made.files[0], ANYBODY)
    assert filled[0] == "<person> and <person2>" and filled[CONTROLS + 1] == [photos[0]] and filled[CONTROLS + VALUES + 1] == [photos[1]]
    assert all(filled[CONTROLS + number * VALUES + 1] is None for number in (2, 3))


def test_a_stranger_is_told_what_is_missing(handlers: Handlers, photos: list[str]) -> None:
    made = drawn(handlers, Slot("person", (photos[0],)))
    stranger: Any = SimpleNamespace(session_hash="stranger")
    other = handlers.studio.session("stranger").pipe = tiny.pipeline("sd")
    other.base = replace(other.base, name="another")
    filled = handlers.restore(made.files[0], stranger)
    assert filled[CONTROLS + 1] is None and "made with tiny; another" in filled[-2] and "Add the pictures of `<person>` again" in filled[-2]
    del other.adapters["person"]
    filled = handlers.restore(made.files[0], stranger)
    assert filled[OPENED] == [0] and "no adapter for person" in filled[-2]


def test_what_a_page_cannot_restore_is_said(handlers: Handlers, photos: list[str]) -> None:
    framed = Slot("person", (photos[0],), 0.5, "crop", (0.1, 0.0, 0.9, 1.0))
    made = drawn(handlers, framed, Slot("vehicle", ()), prompt="<person>")
    note = read_provenance(made.files[0]).subjects[0]
    assert (note.adapter, note.framing, note.crop) == ("person", "crop", framed.crop)
    stranger: Any = SimpleNamespace(session_hash="framing")
    assert read(handlers.restore(made.files[0], stranger))[0] == replace(framed, files=())  # to be added again, framed as it was
    handlers.studio.session("framing").pipe = other = tiny.pipeline("sd")
    other.adapters["person"].revision = "another"
    assert "another adapter for person; the one in use" in handlers.restore(made.files[0], stranger)[-2]
    studio, session = handlers.studio, handlers.studio.session("anybody")
    knobs = (("person", 0.5), ("cat", 2.0))
    ada, tom = (studio.encode(session, studio.pipe, Slot(kind, (photos[0],)), lam=lam) for kind, lam in knobs)
    with session.running() as run:
        *_, made = studio.generate(session, run, studio.pipe, "<person> and <cat>", [ada, tom], steps=2, seed=1)
    *_, told, _ = filled = handlers.restore(made.files[0], ANYBODY)
    assert "(`<person>` 0.5 and 1, `<cat>` 2 and 1)" in told and filled[CONTROLS - 2] == 0.5


def test_a_file_that_was_not_made_here_changes_nothing(handlers: Handlers, photos: list[str]) -> None:
    *skipped, told, _ = handlers.restore(photos[0], ANYBODY)
    assert all(value == gr.skip() for value in skipped) and "carries no settings" in told


def test_a_dropped_example_finds_its_pictures(pipe: NestedAttentionPipeline, photos: list[str], tmp_path: Path) -> None:
    subject = pipe.encode("person", photos[0])
    generation = pipe(PROMPT, [subject], num_images=2, steps=2, seed=4)
    results = [str(tmp_path / f"result-{k}.png") for k in range(2)]
    for image, made, file in zip(generation.images, provenances(pipe, generation, [subject], {}), results, strict=True):
        made.save(image, Path(file))
    assert [read_provenance(file).settings.seed for file in results] == [4, 5] and read_provenance(results[0]).settings.num_images == 1
    example = Example("Ada", PROMPT, 4, (Slot("person", (photos[0],)),), tuple(results))
    *filled, opened, told, _ = Handlers(Studio(pipe), [example]).restore(results[1], ANYBODY)
    assert told == "Settings restored." and opened == [0] and filled[CONTROLS + 1] == [photos[0]]
