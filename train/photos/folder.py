"""Photos in a folder that `train.prepare` has written."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_attention.errors import NestedAttentionError
from train.photos.sample import PhotoSample, checked_caption, read_stored

METADATA = "metadata.jsonl"
IMAGES, REFERENCES = "images", "references"


@dataclass(frozen=True)
class PreparedPhoto:
    """A line of a prepared folder's `metadata.jsonl`.

    `file_name` and `reference` are paths in the folder, `width` and `height` the photo's in pixels, `method` what found
    the subject (see `nested_attention.faces.SAID`).
    """

    file_name: str
    reference: str
    text: str
    width: int
    height: int
    method: str


def is_prepared(folder: Path) -> bool:
    return (folder / METADATA).is_file() and (folder / REFERENCES).is_dir()


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with how messages call its line.

    Raises:
        NestedAttentionError: a line is no JSON object, or the file is not in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would cut strings, in which JSON allows U+2028
    except UnicodeDecodeError as error:
        raise NestedAttentionError(f"{path} is not in UTF-8 ({error}); save it again in this encoding.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise NestedAttentionError(f'line {number} of {path} is not of the form {{"file_name": ...}}; correct that line.')
        yield f"line {number} of {path}", row


class FolderSource:
    """The photos of a prepared folder, with `<kind>` in their captions.

    Raises:
        NestedAttentionError: the folder is not prepared, empty, prepared for another kind, or its metadata is damaged.
    """

    def __init__(self, folder: Path, kind: str):
        if not is_prepared(folder):
            raise NestedAttentionError(
                f"{folder} is not prepared for training; run `python -m train.prepare {folder} --kind {kind}` "
                "and give the folder that it writes."
            )
        self.folder = folder
        self.photos: list[PreparedPhoto] = []
        for name, row in json_lines(folder / METADATA):
            try:
                photo = PreparedPhoto(**row)
            except TypeError as error:
                raise NestedAttentionError(f"{name} is not as train.prepare writes it ({error}); run it again.") from error
            self.photos.append(replace(photo, text=checked_caption(photo.text, name, kind)))
        if not self.photos:
            raise NestedAttentionError(f"{folder / METADATA} is empty; run train.prepare again.")

    @property
    def shards(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self.photos)

    def size(self, index: int) -> tuple[int, int]:
        return self.photos[index].height, self.photos[index].width

    def caption(self, index: int) -> str:
        return self.photos[index].text

    def mark(self, index: int) -> str:
        photo = self.photos[index]
        size = (self.folder / photo.reference).stat().st_size  # another crop, another size
        return f"{photo} {size}"

    def __getitem__(self, index: int) -> PhotoSample:
        photo = self.photos[index]
        without = f"remove its line from {self.folder / METADATA} and give the same command"
        image, reference = (
            read_stored(self.folder / file, f"{file} in {self.folder}", without) for file in (photo.file_name, photo.reference)
        )
        return PhotoSample(image, reference, photo.text, Path(photo.file_name).stem)
