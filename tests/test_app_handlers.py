"""What the page's handlers answer, without a server, on tiny random weights."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from nested_attention import NestedAttentionError, NestedAttentionPipeline
from nested_attention.prompts import placeholders
from nested_attention.provenance import read_provenance
from nested_attention.ui import inside
from nested_attention.ui.app import build_app, model_updates
from nested_attention.ui.controls import CONTROLS, knob_defaults
from nested_attention.ui.examples import READY_MADE, Example, load_examples
from nested_attention.ui.explain import SHOWN, enlarged, explain_point
from nested_attention.ui.handlers import Handlers
from nested_attention.ui.models import OWN
from nested_attention.ui.slots import EMPTY, VALUES, Slot, empty_slot, look, panel_values, slot_of
from nested_attention.ui.studio import Result, Studio, provenances
from tests import tiny

PROMPT = "<person> on the beach"
ANYBODY: Any = SimpleNamespace(session_hash="anybody")
OPENED = CONTROLS + 4 * VALUES  # where `restore` says which slots are open


@pytest.fixture(scope="module")
def pipe() -> NestedAttentionPipeline:
    return tiny.pipeline("sd")


@pytest.fixture
def handlers(pipe: NestedAttentionPipeline) -> Handlers:
    return Handlers(Studio(pipe), load_examples())


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    files = [str(tmp_path / f"{k}.png") for k in range(2)]
    for k, file in enumerate(files):
        tiny.photo(k).save(file)
    return files


def plain(value: Any) -> Any:
    """A component's value where a handler returned an update."""
    return value.value if isinstance(value, gr.components.Component) else value


def sent(values: list) -> list:
    """What the page sends back after an update of controls and slots: galleries come as pairs, skipped values as they began."""
    begin = [PROMPT, "", 2, 3, 3.0, 5, False, 1.0, 1.0, *panels()]
    values = [first if value == gr.skip() else plain(value) for value, first in zip(values, begin, strict=True)]
    return [[(file, None) for file in value] if isinstance(value, list) else value for value in values]


def panels(*slots: Slot) -> list:
    """Values of all four panels, `slots` in the first ones."""
    return [value for slot in [*slots, *[Slot("person", ())] * (4 - len(slots))] for value in panel_values(slot)]


def read(filled: list) -> list[Slot]:
    """The slots in what a handler gives the page."""
    sides = sent(filled[: CONTROLS + 4 * VALUES])[CONTROLS:]
    return [slot_of(sides[start : start + VALUES]) for start in range(0, len(sides), VALUES)]


def values(*slots: Slot, **changes: Any) -> list:
    controls = {
        "prompt": PROMPT,
        "negative": "",
        "count": 2,
        "steps": 3,
        "guidance": 3.0,
        "seed": 5,
        "new": False,
        "lam": 1.0,
        "weight": 1.0,
    }
    return sent([*(controls | changes).values(), *panels(*slots)])


def drawn(handlers: Handlers, *slots: Slot, **changes: Any) -> Result:
    *_, last = handlers.generate(ANYBODY, *values(*slots, **changes))
    assert "Done" in last[1], last
    result = handlers.studio.session("anybody").result
    assert result is not None and last[0] == list(result.files)
    return result


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file))


# ------------------------------------------------------------------------------------------------- pictures dropped back


def test_a_dropped_picture_fills_the_page_so_that_it_is_drawn_again(handlers: Handlers, photos: list[str]) -> None:
    slots = Slot("cat", (photos[0],), 0.8), Slot("person", (photos[1],), framing="crop", crop=(0.1, 0.0, 0.9, 1.0))
    made = drawn(handlers, *slots, prompt="<person> and <cat>", guidance=1.5, lam=0.7)
    *filled, opened, told, _ = handlers.restore(made.files[1], ANYBODY)
    assert told == "Settings restored." and opened == [0, 1]
    handlers.studio.session("anybody").result = None
    *_, last = handlers.generate(ANYBODY, *sent(filled))
    assert np.array_equal(pixels(last[0][0]), pixels(made.files[1]))


def test_a_dropped_picture_clears_what_it_does_not_use_and_takes_the_slots_names(handlers: Handlers, photos: list[str]) -> None:
    session = handlers.studio.session("anybody")
    ada = handlers.studio.encode(session, Slot("person", (photos[0],)), "<ada>")
    bob = handlers.studio.encode(session, Slot("person", (photos[1],)), "<person>")
    *_, made = handlers.studio.generate(session, "<Ada> and <person>", [ada, bob], steps=2, seed=1)
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
    session = handlers.studio.session("anybody")
    ada, tom = (handlers.studio.encode(session, Slot(kind, (photos[0],)), lam=lam) for kind, lam in (("person", 0.5), ("cat", 2.0)))
    *_, made = handlers.studio.generate(session, "<person> and <cat>", [ada, tom], steps=2, seed=1)
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


# ---------------------------------------------------------------------------------------------------- examples and slots


def test_an_example_fills_the_page(handlers: Handlers) -> None:
    example = handlers.examples[1]
    event: Any = SimpleNamespace(index=1)
    *filled, opened, notice, offer, pictures, status = handlers.pick(event, ANYBODY)
    assert pictures == list(example.results) and opened == [0, 1] and "press Generate" in status
    assert (notice, offer.visible) == ("", False)  # of something else
    assert read(filled)[:3] == [*example.slots, empty_slot(handlers.studio.pipe, "person")]
    steps, guidance, negative, lam = knob_defaults(handlers.studio.pipe)
    assert filled[:CONTROLS] == [example.prompt, negative, len(pictures), steps, guidance, example.seed, False, lam, 1.0]
    handlers.studio.session("anybody").pipe = lonely = tiny.pipeline("sd")
    del lonely.adapters["cat"]
    filled = handlers.pick(event, ANYBODY)
    assert read(filled)[0].kind == "person" and "no adapter for cat" in filled[-1]


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


def test_a_bad_upload_is_said_in_its_slot(pipe: NestedAttentionPipeline, photos: list[str], tmp_path: Path) -> None:
    (bad := tmp_path / "notes.png").write_text("no picture")
    seen, note, *_ = look(pipe, Slot("person", (photos[0], str(bad))))
    assert len(seen.value) == 1 and "⚠️ notes.png is not a picture" in note and "the whole picture" in note
    seen, note, *_ = look(pipe, Slot("dragon", (photos[0],)))
    assert not seen.value and "no adapter for dragon" in note


def test_as_many_faces_are_offered_as_there_are(pipe: NestedAttentionPipeline, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ways(framing: str, kind: str = "person") -> tuple[list[str], dict]:
        _, note, _, update = look(pipe, Slot(kind, (photos[0],), framing=framing))
        assert note
        return [value for _, value in update.choices], update.constructor_args

    looked = []

    def found(image: Image.Image, kind: str) -> list:
        looked.append(kind)
        quad = np.array([(0, 0), (0, 9), (9, 9), (9, 0)], np.float32)
        return [SimpleNamespace(quad=quad, method="opencv")] * 3

    monkeypatch.setattr("nested_attention.faces.find_faces", found)
    assert ways("whole")[0] == ways("crop")[0] == ["whole", "crop", "face"] and not looked  # nobody asked for a face
    choices, update = ways("face 3")
    assert choices == ["whole", "crop", "face", "face 2", "face 3"] and "value" not in update and looked
    assert ways("face 4")[1]["value"] == "whole"


def test_other_models_keep_the_kinds_they_know(pipe: NestedAttentionPipeline) -> None:
    _, *updates = model_updates(pipe, "cat", "vehicle", None, "person")
    assert [update.value for update in updates[:4]] == ["cat", "person", "person", "person"]


def test_the_adapter_that_the_app_started_with_is_shown_and_not_loaded_again(pipe: NestedAttentionPipeline) -> None:
    studio = Studio(pipe, "somebody/adapter")
    parts = {getattr(part, "elem_id", None): part for part in build_app(studio).blocks.values()}
    assert parts["adapter"].value == "somebody/adapter" and OWN in [value for _, value in parts["adapter"].choices]
    assert studio.choose_model(studio.session("anybody"), "tiny", "somebody/adapter") is pipe


# ------------------------------------------------------------------------------------------------ drawing and looking in


def cancelled(handlers: Handlers, run: Iterator) -> tuple:
    """Cancels while a step is on its way to the page: that arrives first, and later steps show nothing."""
    session = handlers.studio.session(ANYBODY.session_hash)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(handlers.cancelled, ANYBODY)
        while session.running:
            time.sleep(0.01)
        assert not answer.done()
        assert list(run) == []
        return answer.result()


def test_what_ends_too_early_leaves_the_last_finished_pictures(
    handlers: Handlers, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = Slot("person", (photos[0],))
    run = handlers.generate(ANYBODY, *values(slot, steps=30))
    assert next(event for event in run if "Step 1 of" in event[1])[0]  # a preview
    assert cancelled(handlers, run) == ([], "Cancelled.")
    made = drawn(handlers, slot)
    run = handlers.compare(ANYBODY)
    assert "ordinary words: step 1" in next(run)[1]
    assert cancelled(handlers, run) == (gr.skip(), "Cancelled.")
    assert handlers.cancelled(ANYBODY) == (gr.skip(), gr.skip())  # nothing was under way

    def breaks(*_: Any, **__: Any) -> None:
        raise NestedAttentionError("no memory is left.")

    monkeypatch.setattr(handlers.studio, "_keep", breaks)
    *_, last = handlers.generate(ANYBODY, *values(slot))
    assert last[0] == list(made.files) and "no memory" in last[2]
    *_, last = handlers.generate(ANYBODY, *values(slot, steps=0))
    assert last[0] == gr.skip() and "steps is 0" in last[2]


def test_with_and_without_the_subject(handlers: Handlers, photos: list[str]) -> None:
    with pytest.raises(gr.Error, match="press Generate first"):
        list(handlers.compare(ANYBODY))
    made, pipe = drawn(handlers, Slot("person", (photos[0],))), handlers.studio.pipe
    *_, ((ordinary, subjects), status) = handlers.compare(ANYBODY)
    assert status.startswith("Done. Seed 5")
    expected = pipe("person on the beach", steps=3, guidance_scale=3.0, seed=5).images[0]
    assert np.array_equal(subjects, enlarged(made.generation.images[0]))
    assert np.abs(np.asarray(ordinary, float) - np.asarray(enlarged(expected), float)).max() <= 2
    assert not np.array_equal(ordinary, subjects)


@pytest.mark.parametrize(("steps", "parts"), [(1, 1), (2, 2), (3, 3)])
def test_only_parts_of_the_schedule_that_were_seen_are_offered(handlers: Handlers, photos: list[str], steps: int, parts: int) -> None:
    drawn(handlers, Slot("person", (photos[0],)), steps=steps)
    intro, *_, part = inside.reset(handlers.studio, "anybody")[:5]
    assert intro == inside.INTRO
    names = [name for name, _ in part.choices]
    assert names == list(inside.PARTS)[: 1 + parts]
    for name in names:
        outer, (_, masks), *_, text, patches = inside.show(handlers.studio, "anybody", "<person>", "1", "all", name)
        assert outer.size == (SHOWN, SHOWN) and len(masks) == 6 and (text, patches.visible) == ("", False)
    if parts < 3:
        with pytest.raises(gr.Error, match="third"):
            inside.show(handlers.studio, "anybody", "<person>", "1", "all", "end")


def test_a_click_is_explained_at_what_is_shown(handlers: Handlers, photos: list[str]) -> None:
    made = drawn(handlers, Slot("person", (photos[0],), strength=0.5))
    maps, grid = made.maps.subject("<person>"), made.maps.resolutions[-1]
    report = explain_point(made, "<person>", 1, 0.0, 0.0, grid, 2)
    share = float(maps.outer(grid, 2)[1, 0, 0])
    assert report.words == {"<person>": pytest.approx(share), "all other words": pytest.approx(1 - share)}
    assert report.tokens[0][1] == pytest.approx(float(maps.nested(grid, 2)[1, 0, 0].max()))
    text, patches = inside.explain(handlers.studio, "anybody", "<person>", "2", f"{grid[0]} x {grid[1]}", "end", (0, 0))
    assert f"goes to: `<person>` {share:.0%}" in text and "strength 0.5: its value lies 50% of the way" in text and len(patches.value) == 1


def test_looking_inside_says_when_there_is_nothing(handlers: Handlers) -> None:
    intro, *choices, point, patches = inside.reset(handlers.studio, "anybody")
    assert "Press Generate first" in intro and choices[4:] == [None] * 4 and (point, patches.visible) == ("", False)
    *_, last = handlers.generate(ANYBODY, *values(prompt="a tree"))
    assert "Done" in last[1] and "without a subject" in inside.reset(handlers.studio, "anybody")[0]
    handlers.pick(SimpleNamespace(index=0), ANYBODY)
    assert "Press Generate first" in inside.reset(handlers.studio, "anybody")[0]
