"""Photos in tar files as WebDataset has them: `KEY.jpg`, `KEY.reference.png`, and `KEY.txt` or `KEY.json` with "text".

The headers of every shard are read once. Where each file lies is kept in `index.json` beside the shards, so that any
photo can be read by its number.
"""

import glob
import json
import re
import tarfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from nested_attention.errors import NestedAttentionError
from nested_attention.files import replaced
from nested_attention.images import read_image
from train.photos.sample import PhotoSample, checked_caption, upright_size

INDEX = "index.json"
PARTS = {  # how a name goes on after its key -> what is in the file
    **dict.fromkeys(("jpg", "jpeg", "png"), "image"),
    **{f"reference.{end}": "reference" for end in ("png", "jpg", "jpeg")},
    **dict.fromkeys(("txt", "json"), "caption"),
}  # fmt: skip
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Stored(NamedTuple):
    """Where a photo lies in its shard: `(offset, bytes)` of its files; `size` is the photo's height and width."""

    key: str
    size: tuple[int, int]
    image: tuple[int, int]
    reference: tuple[int, int]
    caption: tuple[int, int]
    as_json: bool


class ShardSource:
    """The photos of all shards that a pattern names.

    Raises:
        NestedAttentionError: there is no such shard, one is damaged or compressed, or a photo lacks one of its files.
    """

    def __init__(self, pattern: str):
        self.paths = expand(pattern)
        parts = indexed(self.paths)
        self.shards = [len(part) for part in parts]
        self.places = [(path, stored) for path, part in zip(self.paths, parts, strict=True) for stored in part]
        if not self.places:
            raise NestedAttentionError(f"there is no photo in {pattern}; a photo KEY is stored as KEY.jpg, KEY.reference.png and KEY.txt.")

    def __len__(self) -> int:
        return len(self.places)

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.places[index][1].size
        return height, width

    def caption(self, index: int) -> str:
        path, stored = self.places[index]
        with open(path, "rb") as file:
            return caption_of(read(file, stored.caption), stored.as_json, f"{stored.key} in {path.name}")

    def __getitem__(self, index: int) -> PhotoSample:
        path, stored = self.places[index]
        with open(path, "rb") as file:
            image = read_image(read(file, stored.image), f"{stored.key} in {path.name}")
            reference = read_image(read(file, stored.reference), f"the reference of {stored.key} in {path.name}")
        return PhotoSample(image, reference, self.caption(index), stored.key)


def read(file: IO[bytes], place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def caption_of(content: bytes, as_json: bool, name: str) -> str:
    try:
        return checked_caption(json.loads(content)["text"] if as_json else content.decode(), name)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise NestedAttentionError(f'the caption of {name} is not text, or JSON with "text"; write it again.') from error


def expand(pattern: str) -> list[Path]:
    """The files of `data-{000000..000012}.tar` or `data-*.tar`, sorted.

    Raises:
        NestedAttentionError: one of them is missing.
    """
    if match := RANGE.search(pattern):
        low, high = match.groups()
        numbers = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
        return [path for number in numbers for path in expand(pattern[: match.start()] + number + pattern[match.end() :])]
    found = sorted(Path(path) for path in glob.glob(pattern))
    if not found:
        raise NestedAttentionError(f"there is no file {pattern}; check the path and the numbers of the shards.")
    return found


def indexed(shards: list[Path]) -> list[list[Stored]]:
    """What lies where in each shard, from the index beside it if the shard has not changed since."""
    known = {folder: read_index(folder) for folder in {shard.parent for shard in shards}}
    changed = set()
    for shard in shards:
        stat, entries = shard.stat(), known[shard.parent]
        state = [stat.st_size, stat.st_mtime_ns]
        if entries.get(shard.name, {}).get("state") != state:
            entries[shard.name] = {"state": state, "photos": scanned(shard)}
            changed.add(shard.parent)
    for folder in changed:
        with suppress(NestedAttentionError), replaced(folder / INDEX) as fresh:  # if nothing can be written there, read each time
            fresh.write_text(json.dumps(known[folder]))
    return [[Stored(*photo) for photo in known[shard.parent][shard.name]["photos"]] for shard in shards]


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text()) if (folder / INDEX).is_file() else {}


def scanned(shard: Path) -> list[Stored]:
    """Reads the headers of a shard, those of its photos, and its captions."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    photos = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                _, _, end = path.name.partition(".")
                if member.isfile() and end.lower() in PARTS:
                    parts.setdefault(str(path)[: -len(end) - 1], {})[PARTS[end.lower()]] = member
            for key, files in parts.items():
                if missing := {"image", "reference", "caption"} - files.keys():
                    raise NestedAttentionError(
                        f"{key} in {shard.name} has no {' and no '.join(sorted(missing))}; a photo is stored as KEY.jpg, KEY.reference.png "
                        "and KEY.txt."
                    )
                content = {part: tar.extractfile(member) for part, member in files.items()}
                assert content["image"] and content["caption"]
                name, as_json = f"{key} in {shard.name}", files["caption"].name.lower().endswith("json")
                caption_of(content["caption"].read(), as_json, name)
                image, reference, caption = ((files[p].offset_data, files[p].size) for p in ("image", "reference", "caption"))
                photos.append(Stored(key, upright_size(content["image"], name), image, reference, caption, as_json))
    except tarfile.TarError as error:
        raise NestedAttentionError(f"{shard} is damaged or compressed ({error}); write it again as a plain tar file.") from error
    return photos
