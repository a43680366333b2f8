"""Parts of the app that need no visitor."""

import pytest

from nested_attention.bases import BASES
from nested_attention.provenance import UNCUT, read_provenance
from nested_attention.ui.examples import load_examples
from nested_attention.ui.gpu import on_gpu
from nested_attention.ui.session import Slot
from nested_attention.ui.slots import EMPTY, one_more, slot_labels, without
from nested_attention.ui.studio import put_into_prompt
from tests import tiny


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


def test_without_zerogpu_functions_stay_as_they_are() -> None:
    def work() -> None:
        pass

    assert on_gpu(work) is work
