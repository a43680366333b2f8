"""Examples, slots and models: what the page's handlers answer, without a server, on tiny random weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from nested_attention import NestedAttentionPipeline
from nested_attention.prompts import placeholders
from nested_attention.ui.app import build_app, model_updates
from nested_attention.ui.controls import CONTROLS, knob_defaults
from nested_attention.ui.examples import READY_MADE
from nested_attention.ui.handlers import Handlers
from nested_attention.ui.models import OWN
from nested_attention.ui.session import Session
from nested_attention.ui.slots import EMPTY, Slot, empty_slot, look
from nested_attention.ui.studio import Studio
from tests import tiny
from tests.page import ANYBODY, panels, read, sent


def test_an_example_fills_the_page(handlers: Handlers) -> None:
    example = handlers.examples[1]
    event: Any = SimpleNamespace(index=1)
    *filled, opened, notice, offer, pictures, status, _ = handlers.pick(event, ANYBODY)
    assert pictures == list(example.results) and opened == [0, 1] and "press Generate" in status
    assert (notice, offer.visible) == ("", False)  # of something else
    assert read(filled)[:3] == [*example.slots, empty_slot(handlers.studio.pipe, "person")]
    steps, guidance, negative, lam = knob_defaults(handlers.studio.pipe)
    assert filled[:CONTROLS] == [example.prompt, negative, len(pictures), steps, guidance, example.seed, False, lam, 1.0]
    handlers.studio.session("anybody").pipe = lonely = tiny.pipeline("sd")
    del lonely.adapters["cat"]
    filled = handlers.pick(event, ANYBODY)
    assert read(filled)[0].kind == "person" and "no adapter for cat" in filled[-2]


def test_a_ready_made_prompt_brings_the_subjects_it_names(handlers: Handlers, photos: list[str]) -> None:
    def choose(prompt: str, *slots: Slot) -> tuple[list[Slot], str]:
        filled = handlers.ready_made([prompt], ANYBODY, *sent([*[None] * CONTROLS, *panels(*slots)])[CONTROLS:])
        assert filled[0] == prompt and all(value == gr.skip() for value in filled[1:CONTROLS])
        return [slot for slot in read(filled) if slot.files], filled[-2]

    ada, tom = handlers.examples[1].slots
    (max_,), own = handlers.examples[2].slots, Slot("person", (photos[0],), 0.7)
    assert choose("<person> in the snow", ada) == ([ada], "")
    assert choose("<person> in the snow", max_, tom) == ([max_], "")
    assert choose("<cat> in the snow", ada) == ([tom], "`<cat>` is one of our examples; press Generate, or add pictures of your own.")
    assert choose("<person> and <cat>", own)[0] == [own, tom]
    assert choose("<person>", ada, own) == ([own], "")
    assert choose("<cat>", *[own] * 4)[0] == [own] * 4  # nobody's own pictures go; Generate says what is missing
    assert "no adapter for vehicle" in choose("<vehicle>", ada)[1]
    assert {name for prompt in READY_MADE for name in placeholders(prompt)} <= {f"<{kind}>" for kind in handlers.ours}


def test_the_first_press_on_a_fresh_page_draws_the_first_example(handlers: Handlers) -> None:
    page = build_app(handlers.studio)
    example, parts = handlers.examples[0], {getattr(part, "elem_id", None): part for part in page.blocks.values()}
    assert parts["prompt"].value == example.prompt and parts["seed"].value == example.seed and parts["insert-0"].interactive
    assert len(parts["files-0"].value) == len(parts["seen-0"].value) == 1 and "<person>" in parts["names"].value
    pipe = tiny.pipeline("sd")
    pipe.adapters.clear()
    parts = {getattr(part, "elem_id", None): part for part in build_app(Studio(pipe)).blocks.values()}
    assert parts["prompt"].value and "<" not in parts["prompt"].value and parts["insert-0"].value == EMPTY


def test_a_full_queue_keeps_nobody_from_filling_in_the_page(pipe: NestedAttentionPipeline) -> None:
    waiting = {event.name for event in build_app(Studio(pipe)).fns.values() if event.fn and event.queue}
    waiting.remove("close")  # which gradio calls itself
    assert waiting == {"_compare", "_generate", "encode", "fetch_faces", "generate", "load"}


def test_a_bad_upload_is_said_in_its_slot(pipe: NestedAttentionPipeline, photos: list[str], tmp_path: Path) -> None:
    (bad := tmp_path / "notes.png").write_text("no picture")
    session = Session(pipe)
    seen, note, *_ = look(session, Slot("person", (photos[0], str(bad))))
    assert len(seen.value) == 1 and "⚠️ notes.png is not a picture" in note and "the whole picture" in note
    seen, note, *_ = look(session, Slot("dragon", (photos[0],)))
    assert not seen.value and "no adapter for dragon" in note
    seen, note, *_ = look(session, Slot("person", tuple(photos[:1] * 9)))
    assert not seen.value and "9 pictures of person were given; at most 8" in note


def test_as_many_faces_are_offered_as_there_are(pipe: NestedAttentionPipeline, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(pipe)

    def ways(framing: str, kind: str = "person") -> tuple[list[str], dict]:
        _, note, _, update = look(session, Slot(kind, (photos[0],), framing=framing))
        assert note
        return [value for _, value in update.choices], update.constructor_args

    looked = []

    def found(image: Image.Image, kind: str) -> list:
        looked.append(kind)
        quad = np.array([(0, 0), (0, 9), (9, 9), (9, 0)], np.float32)
        return [SimpleNamespace(quad=quad, method="opencv")] * 3

    monkeypatch.setattr("nested_attention.ui.session.find_faces", found)
    assert ways("whole")[0] == ways("crop")[0] == ["whole", "crop", "face"] and not looked  # nobody asked for a face
    choices, update = ways("face 3")
    assert choices == ["whole", "crop", "face", "face 2", "face 3"] and "value" not in update and looked
    assert ways("face 4")[1]["value"] == "whole"
    Studio(pipe).subjects_of_slots(session, pipe, [Slot("person", (photos[0],), framing="face 2")])
    assert len(looked) == 1  # a picture is searched once


def test_other_models_keep_the_kinds_they_know(pipe: NestedAttentionPipeline) -> None:
    _, *updates = model_updates(pipe, "cat", "vehicle", None, "person")
    assert [update.value for update in updates[:4]] == ["cat", "person", "person", "person"]


def test_another_model_brings_its_steps_and_what_is_said_of_them() -> None:
    pipe = tiny.pipeline("sdxl")
    *_, steps, guidance, negative, lam = model_updates(pipe)
    assert [steps.value, guidance, negative, lam] == knob_defaults(pipe)
    assert f"{pipe.base.fast_steps} gives a quick look" in steps.info


def test_the_adapter_that_the_app_started_with_is_shown_and_not_loaded_again(pipe: NestedAttentionPipeline) -> None:
    studio = Studio(pipe, "somebody/adapter")
    parts = {getattr(part, "elem_id", None): part for part in build_app(studio).blocks.values()}
    assert parts["adapter"].value == "somebody/adapter" and OWN in [value for _, value in parts["adapter"].choices]
    assert studio.choose_model("anybody", "tiny", "somebody/adapter") is pipe
