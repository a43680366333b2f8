"""A folder of photos with captions, made ready for adapter training: `python -m train.prepare FOLDER`.

A caption is `NAME.txt` beside the picture, or "text" in a line of `metadata.jsonl` with "file_name". Of people and cats
the largest face becomes the reference, of other kinds, and of a pet without a cat's face, the whole picture; "box" in
that line, `[left, top, right, bottom]` in fractions, names the subject instead. Written are `images/`, `references/`,
`metadata.jsonl` and a report; with `--shards N` also `shards/`, tar files of N photos each, to be put on a web server.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from PIL import ExifTags, Image

from nested_attention.errors import NestedAttentionError, spoken_at_exit
from nested_attention.faces import FRAME, SEARCHES, Method, cropped, find_faces, framed, insightface_analysis
from nested_attention.files import replaced
from nested_attention.images import padded_square, read_image
from nested_attention.prompts import PLACEHOLDER, placeholders
from train.photos.captions import with_placeholder
from train.photos.folder import IMAGES, METADATA, REFERENCES, PreparedPhoto, json_lines
from train.photos.report import LeftOutError, Reason, Report
from train.photos.shards import write_shards

SHARDS = "shards"
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
PET = "pet"  # may be a dog, whose face nothing here finds
SMALLEST = 48  # side of a face in pixels that shows who it is
SIMILAR = 0.5  # a second face with this share of the first one's area might be meant as well


@dataclass(frozen=True)
class RawPhoto:
    """A picture of the folder: its path there, a name that no other has, and the caption ("" if none) and box as given."""

    file: str
    name: str
    text: str
    box: object = None


def raw_photos(folder: Path) -> Iterator[RawPhoto]:
    """Every picture in the folder and its subfolders, sorted by path.

    Raises:
        NestedAttentionError: a line of its `metadata.jsonl` cannot be used.
    """
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in PICTURES}
    rows = {}
    if (folder / METADATA).is_file():
        for name, row in json_lines(folder / METADATA):
            if not isinstance(row.get("file_name"), str) or not isinstance(row.get("text", ""), str):
                raise NestedAttentionError(f'{name} lacks "file_name" or "text" as a string; correct that line.')
            rows[row["file_name"]] = row
    taken: set[str] = set()
    for file in sorted(files | rows.keys()):
        plain = re.sub(r"[^\w-]+", "-", str(Path(file).with_suffix(""))).strip("-") or "photo"  # nothing is left of a smiley
        name = next(name for k in count(1) if (name := plain if k == 1 else f"{plain}-{k}") not in taken)
        taken.add(name)
        beside = (folder / file).with_suffix(".txt")
        said = beside.read_text(encoding="utf-8-sig", errors="replace") if beside.is_file() else ""
        row = rows.get(file, {})
        yield RawPhoto(file, name, " ".join(row.get("text", said).split()), row.get("box"))


def caption(raw: RawPhoto, kind: str) -> str:
    """The caption with `<kind>` in it.

    Raises:
        LeftOutError: there is none, or nothing in it names the kind.
    """
    if not raw.text:
        raise LeftOutError(Reason.NO_CAPTION, "neither a text file beside it nor a line in metadata.jsonl")
    if others := [name for name in placeholders(raw.text) if name != f"<{kind}>"]:
        raise LeftOutError(Reason.OTHER_PLACEHOLDER, f'{", ".join(others)} in "{raw.text}"')
    text = with_placeholder(raw.text, kind)
    if text is None:
        raise LeftOutError(Reason.NO_WORD, f'"{raw.text}"')
    return text


def reference(image: Image.Image, raw: RawPhoto, kind: str) -> tuple[Image.Image, Method]:
    """A square picture of the subject, `FRAME` pixels wide, and how it was made.

    Raises:
        LeftOutError: it is not clear who the subject is.
    """
    if raw.box is not None:
        try:
            left, top, right, bottom = map(float, raw.box)  # type: ignore[call-overload]
            return padded_square(cropped(image, (left, top, right, bottom)), FRAME), "crop"
        except (TypeError, ValueError) as error:
            raise LeftOutError(Reason.BAD_BOX, str(error)) from error
    faces = find_faces(image, kind)
    if kind not in SEARCHES or (kind == PET and not faces):
        return padded_square(image, FRAME), "whole"
    if not faces:
        raise LeftOutError(Reason.NO_FACE, f"{image.width} x {image.height} pixels")
    if (side := faces[0].area ** 0.5) < SMALLEST:
        raise LeftOutError(Reason.SMALL_FACE, f"{side:.0f} pixels, at least {SMALLEST} are needed")
    if similar := [face for face in faces[1:] if face.area >= SIMILAR * faces[0].area]:
        raise LeftOutError(Reason.SEVERAL_FACES, f"{1 + len(similar)} faces; the caption might mean any of them")
    return framed(image, faces[0]), faces[0].method


def keep(source: Path, image: Image.Image, target: Path) -> Path:
    """Puts the photo at `target`, with a suffix: the file itself if it is an upright RGB JPEG or PNG, else a new JPEG."""
    with Image.open(source) as stored:
        upright = stored.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if stored.mode == "RGB" and stored.format in ("JPEG", "PNG") and upright and "transparency" not in stored.info:
            kept = target.with_name(target.name + (".jpg" if stored.format == "JPEG" else ".png"))
            try:
                os.link(source.resolve(), kept)
            except OSError:  # another disk
                shutil.copyfile(source, kept)
            return kept
    kept = target.with_name(target.name + ".jpg")
    image.save(kept, quality=95)
    return kept


def add(report: Report, raw: RawPhoto, out: Path) -> PreparedPhoto:
    """Writes one photo and its reference into `out`.

    Raises:
        LeftOutError: it cannot be used.
    """
    try:
        image = read_image(report.folder / raw.file)
    except NestedAttentionError as error:
        raise LeftOutError(Reason.UNREADABLE, str(error)) from error
    text = caption(raw, report.kind)
    square, method = reference(image, raw, report.kind)
    square.save(out / REFERENCES / f"{raw.name}.png")
    kept = keep(report.folder / raw.file, image, out / IMAGES / raw.name)
    return PreparedPhoto(f"{IMAGES}/{kept.name}", f"{REFERENCES}/{raw.name}.png", text, image.width, image.height, method)


def prepare(folder: Path, kind: str, out: Path, shards: int | None = None) -> Report:
    """Prepares `folder` for training into `out`, which appears when it is complete; an older prepared folder is replaced.

    `shards`: so many photos lie in each tar file of `out/shards`; None for no such files.

    Raises:
        NestedAttentionError: no picture can be used, or `out` is something else.
    """
    if not PLACEHOLDER.fullmatch(f"<{kind}>") or kind != kind.lower():
        raise NestedAttentionError(f"{kind!r} cannot be a placeholder; name the kind by one word in small letters, such as person or dog.")
    if not folder.is_dir():
        raise NestedAttentionError(f"there is no folder {folder}; check the path.")
    if out.exists() and not (out / "report.json").is_file():
        raise NestedAttentionError(f"{out} is there and was not written by train.prepare; give another folder with --out.")
    if shards is not None and shards < 1:
        raise NestedAttentionError(f"a shard cannot hold {shards} photos; give --shards a number from 1 on, such as 1000.")
    report = Report(folder, kind)
    with replaced(out) as fresh:
        for part in (IMAGES, REFERENCES):
            (fresh / part).mkdir(parents=True)
        for raw in raw_photos(folder):
            try:
                report.used.append(add(report, raw, fresh))
            except LeftOutError as error:
                report.leave_out(raw.file, error)
        if not report.used:
            step = f"{report.summary()}; {report.next_step(report.reasons()[0])}" if report.left_out else "put pictures with captions there"
            raise NestedAttentionError(f"no picture in {folder} can be used for training: {step}.")
        lines = [json.dumps(asdict(photo), ensure_ascii=False) for photo in report.used]
        (fresh / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
        report.write(fresh)
        if shards is not None:
            write_shards(fresh, report.used, fresh / SHARDS, shards)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.prepare", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="person", help="what the photos show: person (if not given), cat, pet, or any other word")
    parser.add_argument("--out", type=Path, help="FOLDER-prepared if not given")
    parser.add_argument("--may-download", action="store_true", help="fetch insightface's models (non-commercial research) if missing")
    parser.add_argument(
        "--shards", type=int, metavar="N", help="also write tar shards of N photos each, OUT/shards/data-000000.tar and so on"
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    out = options.out or folder.with_name(folder.name + "-prepared")
    with spoken_at_exit():
        if options.may_download and options.kind == "person":
            insightface_analysis()
        report = prepare(folder, options.kind, out, options.shards)
    print(f"wrote {out}: {report.summary()}; see {out / 'report.md'}")


if __name__ == "__main__":
    main()
