"""Real photos made ready for training: what is prepared, what is left out, and why."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nested_attention import NestedAttentionError
from nested_attention.faces import FRAME, find_faces
from nested_attention.images import padded_square
from tests.photo_files import ASTRONAUT, CHELSEA, GROUP, PORTRAIT, ROCKET, rows_of
from train.photos.captions import with_placeholder
from train.photos.report import Reason
from train.prepare import prepare


@pytest.fixture(scope="module", autouse=True)
def no_models(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSIGHTFACE_HOME", str(tmp_path_factory.mktemp("no_models")))
        yield


def lying(path: Path) -> None:
    """The astronaut as a camera held sideways stores her: turned, with a note to turn her back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(ASTRONAUT).convert("RGB").crop((0, 0, 400, 512)).rotate(90, expand=True).save(path, exif=exif)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have them: three good photos, and one of everything that can be wrong."""
    folder = tmp_path_factory.mktemp("raw") / "people"
    (folder / "film").mkdir(parents=True)
    shutil.copy(ASTRONAUT, folder / "astronaut.png")
    shutil.copy(PORTRAIT, folder / "film" / "actor.png")
    lying(folder / "turned.jpg")
    shutil.copy(GROUP, folder / "group.jpg")
    shutil.copy(ROCKET, folder / "rocket.jpg")
    shutil.copy(ASTRONAUT, folder / "wordless.png")
    shutil.copy(ASTRONAUT, folder / "silent.png")
    shutil.copy(ASTRONAUT, folder / "with-cat.png")
    (folder / "truncated.jpg").write_bytes(ROCKET.read_bytes()[:20000])
    (folder / "letter.jpg").write_text("Dear reader")
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    Image.open(ASTRONAUT).resize((200, 200)).save(folder / "far.png")
    captions = {
        "astronaut": "a smiling woman in front of\na flag", "film/actor": "Portrait of <person> in black and white",
        "turned": "a young woman in an orange suit", "group": "a man and his friends", "rocket": "a person at a launch pad",
        "wordless": "an astronaut in orange", "with-cat": "<person> with <cat>", "truncated": "a man", "letter": "a man", "tiny": "a man",
        "far": "a woman",
    }  # fmt: skip
    for name, text in captions.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def prepared(people: Path) -> Path:
    out = people.with_name("people-prepared")
    prepare(people, "person", out)
    return out


# --------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("a man on a bench", "person", "<person> on a bench"),
        ("A young, bearded man and a woman", "person", "<person> and a woman"),
        ("a smiling woman", "person", "a smiling <person>"),
        ("someone's hat", "person", "<person>'s hat"),
        ("a man-made lake by a boy", "person", "a man-made lake by <person>"),
        ("two women", "person", None),
        ("My fluffy white kitten sleeps", "cat", "<cat> sleeps"),
        ("a catalogue", "cat", None),
        ("old dog", "dog", "<dog>"),
        ("a small puppy and a cat", "pet", "<pet> and a cat"),
        ("photo of <dog> and a dog", "dog", "photo of <dog> and a dog"),
    ],
)
def test_the_first_phrase_for_the_subject_becomes_the_placeholder(text: str, kind: str, expected: str | None) -> None:
    assert with_placeholder(text, kind) == expected


# ---------------------------------------------------------------------------------------------------------- prepare


def test_what_cannot_be_used_is_left_out_with_its_reason(prepared: Path) -> None:
    report = json.loads((prepared / "report.json").read_text())
    reasons = {entry["file"]: (reason, entry["detail"]) for reason, entries in report["left_out"].items() for entry in entries}
    assert {file: reason for file, (reason, _) in reasons.items()} == {
        "truncated.jpg": "cannot be read", "letter.jpg": "cannot be read", "tiny.png": "cannot be read", "silent.png": "no caption",
        "wordless.png": "no word for the subject", "with-cat.png": "another placeholder", "rocket.jpg": "no face found",
        "far.png": "face too small", "group.jpg": "several faces of similar size",
    }  # fmt: skip
    assert "damaged" in reasons["truncated.jpg"][1] and "8 x 8" in reasons["tiny.png"][1]
    assert "an astronaut in orange" in reasons["wordless.png"][1]
    assert report["used"] == 3 and report["methods"] == {"opencv": 3}
    assert report["resolutions"]["below 256"] == 1 and report["resolutions"]["512 to 767"] == 1
    page = (prepared / "report.md").read_text()
    assert all(file in page for file in reasons) and "write <person> into the caption" in page


def test_captions_get_the_placeholder_and_references_show_the_face(prepared: Path) -> None:
    rows = rows_of(prepared)
    assert {row["file_name"]: row["text"] for row in rows} == {
        "images/astronaut.png": "a smiling <person> in front of a flag",
        "images/film-actor.png": "Portrait of <person> in black and white",
        "images/turned.jpg": "<person> in an orange suit",
    }
    for row in rows:
        reference = Image.open(prepared / row["reference"])
        assert reference.size == (FRAME, FRAME)
        face = find_faces(reference, "person")[0]
        assert face.area > 0.15 * FRAME**2 and abs(face.box[0] + face.box[2] - FRAME) < 0.3 * FRAME


def test_photos_are_kept_as_they_are_unless_they_lie_on_their_side(people: Path, prepared: Path) -> None:
    assert (prepared / "images/astronaut.png").read_bytes() == ASTRONAUT.read_bytes()
    turned = Image.open(prepared / "images/turned.jpg")
    assert turned.size == (400, 512) and not turned.getexif() and Image.open(people / "turned.jpg").size == (512, 400)


def test_the_face_of_a_cat_and_a_given_box_are_framed(tmp_path: Path) -> None:
    for name in ("chelsea.png", "boxed.png"):
        shutil.copy(CHELSEA, tmp_path / name)
    lines = [
        {"file_name": "boxed.png", "text": "the kitten", "box": [0.2, 0.1, 0.8, 0.9]}, {"file_name": "chelsea.png", "text": "a cat"},
        {"file_name": "gone.png", "text": "a cat"},
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = prepare(tmp_path, "cat", tmp_path.with_name("cats-ready"))
    assert [(photo.text, photo.method) for photo in report.used] == [("<cat>", "crop"), ("<cat>", "opencv")]
    assert "no file gone.png" in next(iter(report.left_out.values()))[0][1]


def test_of_a_pet_without_a_cats_face_the_whole_picture_is_the_reference(tmp_path: Path) -> None:
    """No package ships a dog; a rocket has as little of a cat's face."""
    for name, text in ((CHELSEA, "my cat"), (ROCKET, "a brown dog on a meadow")):
        shutil.copy(name, tmp_path / name.name)
        (tmp_path / name.name).with_suffix(".txt").write_text(text)
    out = tmp_path.with_name("pets-ready")
    report = prepare(tmp_path, "pet", out)
    assert [(photo.text, photo.method) for photo in report.used] == [("<pet>", "opencv"), ("<pet> on a meadow", "whole")]
    assert "| the whole picture, nothing cut off | 1 |" in (out / "report.md").read_text()
    assert np.array_equal(Image.open(out / report.used[1].reference), padded_square(Image.open(ROCKET).convert("RGB"), FRAME))


def test_pictures_of_every_suffix_are_used_or_said(tmp_path: Path) -> None:
    Image.open(ROCKET).save(tmp_path / "a.avif")
    for name in ("b.heic", "c.HEIF"):
        (tmp_path / name).write_bytes(bytes.fromhex("00000018") + b"ftypheic" + bytes(64))
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a rocket")
    out = tmp_path.with_name("suffixes-ready")
    report = prepare(tmp_path, "rocket", out)
    assert [photo.file_name for photo in report.used] == ["images/a.jpg"]
    assert [file for file, _ in report.left_out[Reason.UNREADABLE]] == ["b.heic", "c.HEIF"]
    assert "What to do: save it again as PNG or JPEG." in (out / "report.md").read_text()


def test_names_without_letters_and_every_form_of_utf_8_are_read(tmp_path: Path) -> None:
    """Windows begins files with a byte order mark, JSON allows U+2028 in a string, and a name on Linux may be any bytes."""
    for name in ("!.jpg", "a.jpg", "\N{GRINNING FACE}.jpg", os.fsdecode(b"caf\xe9.jpg")):
        shutil.copy(ROCKET, tmp_path / name)
    (tmp_path / "a.txt").write_text("a rocket at night", encoding="utf-8-sig")
    rows = [{"file_name": "!.jpg", "text": "the rocket\u2028on a pad"}, {"file_name": "\N{GRINNING FACE}.jpg", "text": "a rocket"}]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    report = prepare(tmp_path, "rocket", tmp_path.with_name("named-ready"))
    assert [(photo.file_name, photo.text) for photo in report.used] == [
        ("images/photo.jpg", "<rocket> on a pad"), ("images/a.jpg", "<rocket> at night"), ("images/photo-2.jpg", "<rocket>"),
    ]  # fmt: skip
    assert report.summary() == "3 used, 1 left out: 1 no caption (caf?.jpg)"
    metadata.write_text('{"file_name": "a.jpg", "text": "la fusée"}', encoding="latin-1")
    with pytest.raises(NestedAttentionError, match=r"metadata\.jsonl is not in UTF-8 \(.*; save it again in this encoding\."):
        prepare(tmp_path, "rocket", tmp_path.with_name("named-ready"))


def test_without_a_usable_picture_nothing_stays_behind(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    shutil.copy(ROCKET, folder / "rocket.jpg")
    with pytest.raises(NestedAttentionError, match=r"no picture in .*bad can be used.*1 no caption \(rocket.jpg.*write a sentence"):
        prepare(folder, "person", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_only_a_prepared_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.open(ROCKET).save(tmp_path / "in/a.jpg")
    (tmp_path / "in/a.txt").write_text("a rocket")
    with pytest.raises(NestedAttentionError, match=r"not written by train\.prepare"):
        prepare(tmp_path / "in", "rocket", tmp_path / "in")
    first = prepare(tmp_path / "in", "rocket", tmp_path / "out")
    assert prepare(tmp_path / "in", "rocket", tmp_path / "out") == first and len(list((tmp_path / "out/images").iterdir())) == 1
