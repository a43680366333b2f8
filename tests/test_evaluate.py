"""What the numbers of the README are made of."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nested_attention import NestedAttentionError
from nested_attention.bases import ASSETS
from train.evaluate import FOUND, FOUND_IN_COLOUR, GALLERY, Case, asked, gallery_identities, made_of, make_case, measure, run, shows
from train.judge import load_judge
from train.scores import Score, ScoreFile
from train.storybook.captions import Caption
from train.storybook.kinds import KINDS
from train.storybook.picture import render
from train.storybook.sampling import Character, Picture, Placed


def test_the_interval_is_wilsons() -> None:
    score = Score.of([True] * 8 + [False] * 2, [True] * 10)
    assert (score.value, score.count, score.renders) == (0.8, 10, 1.0)
    assert (score.low, score.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_part_of_the_same_weights_and_prompts_is_not_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without, cases = ([make_case("cat", index, personalized) for index in range(7)] for personalized in (False, True))
    path = tmp_path / "scores.json"
    file, other_process, source = ScoreFile(path), ScoreFile(path), made_of("cat", cases, None)
    file.keep("cat, base", made_of("cat", without, None), {"style": Score.of([True, True], [True])})
    other_process.keep("cat, personalized", source, {"style": Score.of([True, False], [True])})
    file.keep_seconds({"one image": 1.5})
    file.keep("cat, personalized", made_of("cat", cases, 1.4), {"style": Score.of([False, False], [True])})  # takes nothing away
    again = ScoreFile(path)
    assert again.parts == file.parts and len(again.parts) == 3 and again.seconds == {"one image": 1.5}
    run({"cat": 7}, 1, again)  # at once: there is nothing to draw
    assert "cat, personalized (7 prompts)" in (said := capsys.readouterr().out) and "against the base -50.0" in said
    elsewhere = [make_case("cat", index, True, "validation") for index in range(7)]
    for other in (made_of("cat", cases[1:], None), made_of("cat", elsewhere, None), source | {"weights": "0"}):
        assert again.find("cat, personalized", other) is None
    assert source["weights"] != made_of("person", cases, None)["weights"]
    assert made_of("person", without, None) == made_of("cat", without, 1.4)  # no adapter is asked there


def test_what_is_drawn_is_kept_and_shown(tmp_path: Path) -> None:
    file = ScoreFile(tmp_path / "scores.json")
    run({"base": 2}, 1, file, tmp_path / "sheets")
    (part,) = ScoreFile(file.path).parts
    assert part["part"] == "base, base" and part["scores"]["kind"].count >= 2
    sheet = tmp_path / "sheets/base-base.jpg"
    with Image.open(sheet) as picture:
        assert picture.size == (256, 128)
    source = made_of("base", [make_case("base", index, False) for index in range(2)], None)
    assert shows(sheet, source) and not shows(sheet, source | {"steps": 5}) and not shows(tmp_path / "sheets/none.jpg", source)
    Image.new("RGB", (8, 8)).save(sheet)
    assert not shows(sheet, source)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"seconds": {}, "parts": [{"part": "cat, base", "scores": {"kind": 1}}]}'):
        (file := tmp_path / "scores.json").write_text(content)
        with pytest.raises(NestedAttentionError, match=r"scores\.json holds no scores of this evaluation"):
            ScoreFile(file)


def test_the_same_pictures_are_asked_for_with_and_without_a_subject() -> None:
    for suite in ("cat", "person + cat"):
        with_one, without = make_case(suite, 3, True), make_case(suite, 3, False)
        assert with_one.picture == without.picture and "<cat>" in with_one.said.text and "<" not in without.said.text


def test_renders_in_the_place_of_pictures_score_as_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.evaluate.GALLERY_VIEWS", 1)
    judge, cases = load_judge(ASSETS / "storybook/judge"), [make_case("cat", index, True) for index in range(12)]
    scores = measure(judge, "cat", cases, [render(case.picture).image for case in cases])
    assert {"kind", "scene", "style", "accessory", FOUND.format("cat"), FOUND_IN_COLOUR.format("cat")} <= scores.keys()
    assert all(score.value == score.renders for score in scores.values())
    blank = measure(judge, "cat", cases, [np.full((128, 128, 3), 255, np.uint8)] * 12)[FOUND.format("cat")]
    assert blank.value < 0.3 < blank.renders


def test_settings_are_chosen_by_identities_that_are_not_those_of_the_numbers() -> None:
    for kind in KINDS:
        test, validation = (gallery_identities(kind, split) for split in ("test", "validation"))
        assert len(test) == GALLERY and not [identity for identity in validation if identity in test]
    case = make_case("person", 5, True, "validation")
    assert case.picture.subjects[0].character.identity == gallery_identities("person", "validation")[5]


@pytest.mark.parametrize(("style", "fields"), [("plain", ["accessory", "expression"]), ("sketch", ["expression"])])
def test_colours_are_not_asked_of_styles_that_have_none(style: str, fields: list[str]) -> None:
    cat = make_case("cat", 0, True).picture.subjects[0].character
    character = Character("cat", cat.identity, {"expression": "smiling", "accessory": "red scarf"})
    picture = Picture("beach", 0, style, (Placed(character, 0.5, 0.8),))
    said = Caption("a cat", ((0, 5),), (frozenset(character.attributes),), True, True)
    assert sorted(asked(Case("test", 0, picture, said, True), 0)) == fields
