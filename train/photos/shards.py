"""Photos in tar files as WebDataset has them: `KEY.jpg`, `KEY.reference.png`, and `KEY.txt`, or in its place `KEY.json` with
"text" or "caption".

Every shard is read through once. What lies where is kept in an index, so that any photo can be read by its number.
"""

import glob
import io
import json
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nested_attention.errors import NestedAttentionError
from nested_attention.files import replaced
from train.photos.folder import PreparedPhoto
from train.photos.places import OnDisk, OnWeb, Place
from train.photos.sample import PhotoSample, checked_caption, read_stored, upright_size

PARTS = {  # how a name goes on after its key -> what is in the file
    **dict.fromkeys(("jpg", "jpeg", "png"), "image"),
    **{f"reference.{end}": "reference" for end in ("png", "jpg", "jpeg")},
    "txt": "text", "json": "about",
}  # fmt: skip
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
WEB = ("http://", "https://")


class Stored(NamedTuple):
    """A photo in its shard: where its files lie, as `(offset, bytes)`, its height and width, and its caption."""

    key: str
    size: tuple[int, int]
    image: tuple[int, int]
    reference: tuple[int, int]
    caption: str


class ShardSource:
    """The photos of all shards that a pattern names, with `<kind>` in their captions.

    Raises:
        NestedAttentionError: there is no such shard, one is damaged or compressed, a photo lacks one of its files, or its
            caption does not name the kind.
    """

    def __init__(self, pattern: str, kind: str):
        places = expand(pattern)
        parts = [photos_in(place) for place in places]
        self.shards = [len(part) for part in parts]
        self.photos = [
            (place, stored._replace(caption=checked_caption(stored.caption, f"{stored.key} in {place.name}", kind)))
            for place, part in zip(places, parts, strict=True)
            for stored in part
        ]
        if not self.photos:
            raise NestedAttentionError(f"there is no photo in {pattern}; a photo KEY is stored as KEY.jpg, KEY.reference.png and KEY.txt.")

    def __len__(self) -> int:
        return len(self.photos)

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.photos[index][1].size
        return height, width

    def caption(self, index: int) -> str:
        return self.photos[index][1].caption

    def mark(self, index: int) -> str:
        place, stored = self.photos[index]
        return f"{place.name} {stored}"

    def __getitem__(self, index: int) -> PhotoSample:
        place, stored = self.photos[index]
        name = f"{stored.key} in {place.name}"
        without = f"write {place.name} again without the files of {stored.key} and give the same command"
        image = read_stored(place.read(*stored.image), name, without)
        reference = read_stored(place.read(*stored.reference), f"the reference of {name}", without)
        return PhotoSample(image, reference, stored.caption, stored.key)


def expand(pattern: str) -> list[Place]:
    """The shards of `data-{000000..000012}.tar` or `data-*.tar`, sorted; with http in front they lie on a server.

    Raises:
        NestedAttentionError: one of them is missing.
    """
    if match := RANGE.search(pattern):
        low, high = match.groups()
        numbers = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
        return [place for number in numbers for place in expand(pattern[: match.start()] + number + pattern[match.end() :])]
    if pattern.startswith(WEB):
        if "*" in pattern:
            raise NestedAttentionError(f"a server does not tell which files {pattern} means; write their numbers as {{000000..000012}}.")
        return [OnWeb(pattern)]
    found = sorted(Path(path) for path in glob.glob(pattern))
    if not found:
        raise NestedAttentionError(f"there is no file {pattern}; check the path and the numbers of the shards.")
    return [OnDisk(path) for path in found]


def photos_in(place: Place) -> list[Stored]:
    """The photos of a shard, from its index if it has not changed since.

    Raises:
        NestedAttentionError: see `scanned`; or the server does not answer.
    """
    state = place.state()
    known: dict[str, Any] = json.loads(place.index.read_text()) if place.index.is_file() else {}
    if known.get("state") != state:
        known = {"state": state, "photos": scanned(place)}
        with suppress(NestedAttentionError), replaced(place.index) as fresh:  # if nothing can be written there, read each time
            fresh.write_text(json.dumps(known))
    return [Stored(*photo) for photo in known["photos"]]


def scanned(place: Place) -> list[Stored]:
    """Reads a shard from its start to its end: where the files lie, the headers of the photos, and the captions.

    Raises:
        NestedAttentionError: it is damaged or compressed, or a photo lacks one of its files.
    """
    found: dict[str, dict[str, Any]] = {}  # by key
    try:
        with place.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                _, _, end = path.name.partition(".")
                if not member.isfile() or end.lower() not in PARTS:
                    continue
                key, part = str(path)[: -len(end) - 1], PARTS[end.lower()]
                photo, content = found.setdefault(key, {}), tar.extractfile(member)
                assert content
                photo[part] = content.read() if part in ("text", "about") else (member.offset_data, member.size)
                if part == "image":
                    photo["size"] = upright_size(content, f"{key} in {place.name}")
    except tarfile.TarError as error:
        raise NestedAttentionError(f"{place.name} is damaged or compressed ({error}); write it again as a plain tar file.") from error
    for key, photo in found.items():
        text, about = photo.pop("text", None), photo.pop("about", None)
        if text is not None or about is not None:
            photo["caption"] = caption_in(text, about, f"{key} in {place.name}")
        if missing := {"image", "reference", "caption"} - photo.keys():
            raise NestedAttentionError(
                f"{key} in {place.name} has no {' and no '.join(sorted(missing))}; a photo is stored as KEY.jpg, KEY.reference.png and KEY.txt."
            )
    return [Stored(key, **photo) for key, photo in found.items()]


def caption_in(text: bytes | None, about: bytes | None, name: str) -> str:
    """The caption in a photo's text file or, where it has none, in its JSON file `about`: img2dataset, for one, writes both.

    `name` is how the message calls their owner.

    Raises:
        NestedAttentionError: there is none.
    """
    try:
        if text is not None:
            return text.decode("utf-8-sig")
        told = json.loads(about or b"")
        return str(told["text"] if "text" in told else told["caption"])
    except (ValueError, KeyError, TypeError) as error:
        raise NestedAttentionError(f'the caption of {name} is not text, or JSON with "text" or "caption"; write it again.') from error


def write_shards(prepared: Path, photos: Sequence[PreparedPhoto], out: Path, each: int) -> None:
    """Writes photos of the folder `prepared` into the new folder `out`, as `data-000000.tar`, ... with `each` of them in one."""
    out.mkdir()
    for number, first in enumerate(range(0, len(photos), each)):
        with tarfile.open(out / f"data-{number:06d}.tar", "w") as tar:
            for photo in photos[first : first + each]:
                image, text = Path(photo.file_name), photo.text.encode()
                tar.add(prepared / image, image.name)
                tar.add(prepared / photo.reference, f"{image.stem}.reference.png")
                caption = tarfile.TarInfo(f"{image.stem}.txt")
                caption.size = len(text)
                tar.addfile(caption, io.BytesIO(text))
