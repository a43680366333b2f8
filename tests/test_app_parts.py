"""Parts of the app that need no visitor."""

import sys
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest

from app import main
from nested_attention import NestedAttentionPipeline
from nested_attention.bases import BASES
from nested_attention.provenance import UNCUT, read_provenance
from nested_attention.ui.app import build_app
from nested_attention.ui.controls import CONTROLS
from nested_attention.ui.examples import load_examples
from nested_attention.ui.gpu import on_gpu
from nested_attention.ui.handlers import insert_missing, insert_one
from nested_attention.ui.session import Slot
from nested_attention.ui.slots import EMPTY, one_more, slot_labels, without
from nested_attention.ui.studio import Studio, missing_placeholders, put_into_prompt
from tests import tiny
from tests.page import values


def test_slots_open_and_close() -> None:
    pipe = tiny.pipeline("sd")
    assert one_more([0]) == [0, 1] and one_more([0, 2]) == [0, 1, 2]
    *emptied, opened = without(pipe, 0, "cat", [0, 2])
    assert opened == [2] and emptied[:3] == ["cat", None, 1.0] and emptied[3].value == "whole" and emptied[4:] == [0, 0, 100, 100]
    assert without(pipe, 0, "cat", [0])[-1] == [0]
    *buttons, line = slot_labels([Slot("cat", ()), Slot("person", ("a",)), Slot("person", ("b",))])
    assert buttons == [EMPTY, "Put <person> into the prompt", "Put <person2> into the prompt"]
    assert "`<person>` person, subject 2" in line and "`<person2>` person, subject 3" in line


def test_an_example_is_drawn_with_what_its_click_fills_in() -> None:
    for example in load_examples():
        made = [read_provenance(file) for file in example.results]
        assert [picture.settings.seed for picture in made] == [example.seed + k for k in range(len(made))]
        for picture in made:
            base, settings = BASES[picture.base], picture.settings
            assert (settings.prompt, settings.steps, settings.guidance_scale) == (example.prompt, base.steps, base.guidance_scale)
            assert all((note.strength, note.lam, note.token_weight, note.crop) == (1.0, 1.0, 1.0, UNCUT) for note in picture.subjects)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a person, smiling", "<person>, smiling"), ("A Person's hat", "<person>'s hat"), ("a person-like tree", "<person>, a person-like tree"),
        ("<person2> and a person.", "<person2> and <person>."), ("<person2> at sea", "<person> and <person2> at sea"),
        ("in the snow", "<person> in the snow"), ("personal space", "<person>, personal space"), (" ", "<person>"),
    ],
)  # fmt: skip
def test_a_placeholder_takes_the_place_of_its_word(prompt: str, expected: str) -> None:
    assert put_into_prompt(prompt, "<person>", ("a person", "person")) == expected


def test_a_slots_button_writes_what_the_prompt_lacks() -> None:
    button = "Put <person> into the prompt"
    assert insert_one("a person smiling", button, "person") == "<person> smiling"
    assert insert_one("<Person> smiling", button, "person") == "<Person> smiling"
    assert insert_one("<person2> smiling", button, "person") == "<person> and <person2> smiling"
    assert insert_one("in the snow", EMPTY, "person") == "in the snow"


def test_forgotten_placeholders_are_known_before_a_picture_is_read() -> None:
    slots = [Slot(kind, files) for kind, files in (("cat", ("lost",)), ("person", ()), ("person", ("lost",)), ("person", ("lost",)))]
    assert missing_placeholders("<Person2> in the snow", slots) == {"<cat>": "cat", "<person>": "person"}
    prompt, *_ = insert_missing("a cat and <Person2> in the snow", *values(*slots)[CONTROLS:])
    assert prompt == "<person> and <cat> and <Person2> in the snow" and missing_placeholders(prompt, slots) == {}
    assert missing_placeholders("in the snow", [Slot("", ("lost",))]) == {}  # where a model has no adapter


def test_without_zerogpu_functions_stay_as_they_are() -> None:
    def work() -> None:
        pass

    assert on_gpu(work) is work


def test_on_zerogpu_all_that_computes_asks_for_the_gpu(pipe: NestedAttentionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = []

    def gpu(function: Callable) -> Callable:
        @wraps(function)
        def asked(*arguments: Any) -> Any:
            return function(*arguments)

        asking.append(asked)
        return asked

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=gpu))
    wired = {event.name for event in build_app(Studio(pipe)).fns.values() if event.fn in asking}
    assert wired == {"_generate", "_compare", "encode", "generate"}


@pytest.mark.parametrize("port", ["0", "99999", "-1", "x"])
def test_what_is_no_port_is_refused_before_anything_is_loaded(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--port", port])
    with pytest.raises(SystemExit):
        main()
    assert f"argument --port: {port} is no port" in capsys.readouterr().err
