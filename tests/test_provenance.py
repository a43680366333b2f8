"""What a dropped PNG may carry: anybody can write one."""

import json
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nested_attention.errors import NestedAttentionError
from nested_attention.provenance import CHUNK, Provenance, SubjectNote, read_provenance
from nested_attention.settings import Settings

SETTINGS = Settings("<ada> at sea", "", 1, 12, 2.5, 7, 128, 128)
NOTE = SubjectNote("<ada>", "person", 1.0, 0.5, 2.0, ("f00",), "b0b", "crop", (0.1, 0.0, 0.9, 1.0))
MADE = Provenance("storybook", SETTINGS, (NOTE,))


def written(folder: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text(CHUNK, text)
    Image.new("RGB", (8, 8)).save(folder / "dropped.png", pnginfo=info)
    return folder / "dropped.png"


def changed(**changes: Any) -> dict:
    """The record with other settings, or another subject where a name is one of a note's."""
    content = asdict(MADE)
    for name, value in changes.items():
        (content["subjects"][0] if name in content["subjects"][0] else content["settings"])[name] = value
    return content


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    MADE.save(Image.new("RGB", (8, 8)), tmp_path / "made.png")
    assert read_provenance(tmp_path / "made.png") == MADE


def test_the_first_pictures_did_not_tell_adapter_and_framing(tmp_path: Path) -> None:
    content = asdict(MADE)
    for name in ("adapter", "framing", "crop"):
        del content["subjects"][0][name]
    assert read_provenance(written(tmp_path, json.dumps(content))).subjects == (SubjectNote("<ada>", "person", 1.0, 0.5, 2.0, ("f00",)),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "damaged"), ("text", "damaged"), ({}, "damaged"), (asdict(MADE) | {"base": 5}, "base is not text"),
        (asdict(MADE) | {"settings": {}}, "missing"), (asdict(MADE) | {"subjects": "ada"}, "damaged"),
        (asdict(MADE) | {"subjects": [{"kind": "cat"}]}, "pictures"),
        (asdict(MADE) | {"subjects": [asdict(NOTE) | {"placeholder": f"<p{k}>"} for k in range(5)]}, "5 subjects; at most 4"),
        (asdict(MADE) | {"subjects": [asdict(NOTE)] * 2}, "same placeholder"),
        (changed(steps="12"), "steps is 12; choose a number"), (changed(steps=0), "steps is 0"), (changed(num_images=99), "num_images is 99"),
        (changed(seed=None), "a setting has no value"), (changed(seed=-1), "seed is -1"), (changed(prompt=["a"]), "prompt is list, not text"),
        (changed(negative_prompt="x" * 2000), "2000 characters"), (changed(guidance_scale=float("nan")), "guidance_scale is nan"),
        (changed(height="tall"), "height is tall"), (changed(strength=3), "strength of <ada> is 3"), (changed(lam="1"), "have to be numbers"),
        (changed(token_weight=True), "have to be numbers"), (changed(placeholder="ada"), "'ada' is no placeholder"),
        (changed(kind=5), "have to be text"), (changed(pictures=[5]), "have to be text"), (changed(pictures=5), "not iterable"),
        (changed(framing="face 1000000000"), "no framing 'face 1000000000'"), (changed(crop=[0, 0, 1]), "four fractions"),
        (changed(crop=[0, 0, 1, 7]), "four fractions"), (changed(crop=[0, 0, 1, "a"]), "have to be numbers"),
    ],
)  # fmt: skip
def test_what_no_picture_was_made_with_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(NestedAttentionError, match=r"the settings in dropped\.png are damaged .*; set them by hand") as error:
        read_provenance(written(tmp_path, json.dumps(content)))
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_text_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(NestedAttentionError, match="damaged"):
        read_provenance(written(tmp_path, text))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0 a JPEG",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b""),
    ],
    ids=["empty", "text", "cut off", "other", "bomb"],
)  # fmt: skip
def test_what_is_no_png_is_refused(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "dropped.png").write_bytes(content)
    with pytest.raises(NestedAttentionError, match=r"dropped\.png is no PNG that can be read; drop one that was made here\."):
        read_provenance(path)
