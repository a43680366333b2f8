"""Drawing, cancelling and looking in: what the page's handlers answer, without a server, on tiny random weights."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest

from nested_attention.ui import inside
from nested_attention.ui.app import build_app
from nested_attention.ui.explain import SHOWN, enlarged, explain_point
from nested_attention.ui.handlers import EXAMPLE, WAITING, Handlers, finished
from nested_attention.ui.slots import Slot
from tests import tiny
from tests.page import ANYBODY, drawn, values


def cancelled(handlers: Handlers, run: Iterator) -> tuple:
    """Cancels while a step is on its way to the page, which changes nothing there: the run does, as its last word."""
    assert handlers.cancel("Step 1 of 30", ANYBODY) == (gr.skip(), gr.skip())
    (last,) = run
    return last[:2]


def test_what_ends_too_early_leaves_the_last_finished_pictures(
    handlers: Handlers, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, begin, other = Slot("person", (photos[0],)), handlers.examples[0], handlers.examples[1]

    def preview() -> Iterator:
        run = handlers.generate(ANYBODY, *values(slot, steps=30))
        assert next(event for event in run if "Step 1 of" in event[1])[0]
        return run

    assert cancelled(handlers, preview()) == (list(begin.results), "Cancelled.")  # as the page opened
    handlers.pick(SimpleNamespace(index=1), ANYBODY)
    assert cancelled(handlers, preview()) == (list(other.results), "Cancelled.")
    made = drawn(handlers, slot)
    assert cancelled(handlers, preview()) == (list(made.files), "Cancelled.")
    run = handlers.compare(ANYBODY)
    assert "ordinary words: step 1" in next(run)[1]
    assert cancelled(handlers, run) == (gr.skip(), "Cancelled.")
    assert handlers.cancel(finished(made), ANYBODY) == (gr.skip(), gr.skip())  # nothing was under way
    status, forgotten = handlers.cancel(WAITING, ANYBODY)  # it was not this visitor's turn yet
    assert status == "Cancelled." and forgotten != gr.skip()

    session = handlers.studio.session(ANYBODY.session_hash)
    monkeypatch.setattr(session, "folder", SimpleNamespace(name=str(Path(photos[0]))))  # a file, where no picture can be saved
    *_, last = handlers.generate(ANYBODY, *values(slot))
    assert last[0] == list(made.files) and "cannot be written" in last[2]
    *_, last = handlers.generate(ANYBODY, *values(slot, steps=0))
    assert last[0] == gr.skip() and "steps is 0" in last[2] and session.runs == []
    run = preview()
    monkeypatch.setattr("nested_attention.ui.handlers.enlarged", {}.pop)  # an error that no sentence foresaw
    with pytest.raises(KeyError):
        list(run)
    assert handlers.failed(ANYBODY) == list(made.files)


def test_a_seed_is_written_only_where_it_was_drawn(handlers: Handlers) -> None:
    def seeds(**changes: object) -> list:
        return [event[4] for event in handlers.generate(ANYBODY, *values(prompt="a tree", steps=2, **changes))]

    assert all(seed == gr.skip() for seed in seeds(seed=7))  # another may have been typed meanwhile
    for changes in ({"seed": None}, {"new": True}):
        drawn, *rest = seeds(**changes)
        result = handlers.studio.session(ANYBODY.session_hash).result
        assert result is not None and drawn == result.generation.settings.seed and all(seed == gr.skip() for seed in rest)
    *_, last = handlers.generate(ANYBODY, *values(seed=-1))
    assert "seed is -1; choose a number from 0" in last[2] and last[1] == ""


def test_an_example_ends_what_is_being_drawn(handlers: Handlers, photos: list[str]) -> None:
    session = handlers.studio.session(ANYBODY.session_hash)
    run = handlers.generate(ANYBODY, *values(Slot("person", (photos[0],)), steps=30))
    next(run)
    *_, pictures, status, _ = handlers.pick(SimpleNamespace(index=1), ANYBODY)
    (last,) = run
    assert last[:2] == (pictures, status) == (list(handlers.examples[1].results), EXAMPLE)  # whichever of the two comes last
    assert session.result is None and session.shown == handlers.examples[1].results


def test_a_run_that_is_stopped_as_it_ends_is_stopped(handlers: Handlers, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made, session = drawn(handlers, slot := Slot("person", (photos[0],))), handlers.studio.session(ANYBODY.session_hash)
    keep = handlers.studio._keep
    monkeypatch.setattr(handlers.studio, "_keep", lambda *asked: (session.stop("Cancelled."), keep(*asked))[1])
    *_, last = handlers.generate(ANYBODY, *values(slot))
    assert last[:2] == (list(made.files), "Cancelled.") and session.result is made


def test_two_runs_of_a_visitor_end_apart(handlers: Handlers, photos: list[str]) -> None:
    slot, session = Slot("person", (photos[0],)), handlers.studio.session(ANYBODY.session_hash)
    first = handlers.generate(ANYBODY, *values(slot, steps=30))
    next(first)
    with pytest.raises(gr.Error, match="press Generate first"):  # pressed too early, and nothing to the other
        list(handlers.compare(ANYBODY))
    *_, offer = handlers.generate(ANYBODY, *values(slot, prompt="a tree"))
    assert "does not say" in offer[2]
    assert "Step 1 of 30" in next(first)[1]
    drawn(handlers, slot)
    compared = handlers.compare(ANYBODY)
    next(compared)
    *_, last = first
    assert "Done" in last[1] and len(session.runs) == 1
    *_, last = compared
    assert "Done" in last[1] and session.runs == []
    runs = [handlers.generate(ANYBODY, *values(slot)), handlers.compare(ANYBODY)]
    list(map(next, runs))
    assert session.stop("Cancelled.") and [[event[1] for event in run] for run in runs] == [["Cancelled."]] * 2


def test_a_visitor_may_come_back_soon(handlers: Handlers, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """gradio calls `unload` whenever a line breaks, and a run may take longer than a session lasts."""
    made, now = drawn(handlers, Slot("person", (photos[0],))), time.monotonic()
    run = handlers.generate(ANYBODY, *values(Slot("person", (photos[0],)), steps=30))
    next(run)
    handlers.close(ANYBODY)
    assert list(run) == []  # nobody waits for it
    assert handlers.studio.session(ANYBODY.session_hash).result is made

    def later(seconds: float) -> None:
        monkeypatch.setattr("nested_attention.ui.session.time", SimpleNamespace(monotonic=lambda: now + seconds))

    later(3000)
    run = handlers.generate(ANYBODY, *values(Slot("person", (photos[0],))))
    next(run)
    later(9000)
    handlers.studio.purge()
    assert handlers.studio.session(ANYBODY.session_hash).result is made  # a long run
    list(run)
    handlers.close(ANYBODY)
    later(9000 + 400)
    handlers.studio.purge()
    assert handlers.studio.session(ANYBODY.session_hash).result is None


def test_a_client_that_leaves_is_not_drawn_for(handlers: Handlers) -> None:
    studio = handlers.studio
    (generate,) = (fn.fn for fn in build_app(studio).fns.values() if fn.api_name == "generate")
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(generate, "a tree", "", 1, 150, 3.0, 5, ANYBODY)
        while not studio.session(ANYBODY.session_hash).runs:
            time.sleep(0.01)
        handlers.close(ANYBODY)
        with pytest.raises(gr.Error, match="the line was lost"):
            asked.result()
    assert generate("a tree", "", 1, 2, 3.0, 5, ANYBODY)[1]["seed"] == 5


def test_a_run_keeps_the_model_that_it_began_with(handlers: Handlers, photos: list[str]) -> None:
    session, pipe = handlers.studio.session(ANYBODY.session_hash), handlers.studio.pipe
    run = handlers.generate(ANYBODY, *values(Slot("person", (photos[0],))))
    assert any("Step 1" in event[1] for event in run)
    session.turn_to(tiny.pipeline("sdxl"))
    *_, last = run
    assert "Done" in last[1] and session.result is not None and session.result.pipe is pipe
    *_, ((ordinary, _), _) = handlers.compare(ANYBODY)
    expected = pipe("person on the beach", steps=3, guidance_scale=3.0, seed=5).images[0]
    assert np.abs(np.asarray(ordinary, float) - np.asarray(enlarged(expected), float)).max() <= 2


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
    *_, refused = handlers.generate(ANYBODY, *values(prompt=" "))
    assert "prompt is empty" in refused[2] and handlers.look_inside(ANYBODY)[-1] == gr.skip()  # still of these pictures
    handlers.pick(SimpleNamespace(index=0), ANYBODY)
    assert handlers.look_inside(ANYBODY)[-1] is None


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
