"""Photos in a data set of the Hugging Face `datasets` library, from the Hub or from a folder."""

import io
from pathlib import Path
from typing import Any

from nested_attention.errors import NestedAttentionError
from train.photos.sample import PhotoSample, checked_caption, read_stored, upright_size

PICTURES = ["image", "reference"]
COLUMNS = [*PICTURES, "text"]
WITHOUT = "save the other rows in a folder (`select` and `save_to_disk` of the package datasets) and name that folder with --data"


def is_dataset(folder: Path) -> bool:
    """True if `datasets` can load `folder`: it was saved to disk or holds Parquet files."""
    return saved_to_disk(folder) or any(folder.rglob("*.parquet"))


def saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


class HubSource:
    """The training split of a data set with the columns image, reference and text, and `<kind>` in every text.

    `name`: `user/name` or `user/name@revision` on the Hub, or a folder.

    Raises:
        NestedAttentionError: `datasets` is not installed, the data set cannot be loaded, a column or a picture is missing, or
            a text does not name the kind.
    """

    def __init__(self, name: str, kind: str):
        self.name, self.rows = name, loaded(name)
        # datasets keeps the result of a map beside the data set, so that pictures are opened at the first start only
        table = self.rows.map(measured, with_indices=True, input_columns=PICTURES, remove_columns=PICTURES, fn_kwargs={"name": name})
        self.sizes: list[tuple[int, int]] = list(zip(table["height"], table["width"], strict=True))
        self.bytes: list[int] = list(table["reference_bytes"])
        self.captions = [checked_caption(text or "", called(index, name), kind) for index, text in enumerate(table["text"])]
        if not self.sizes:
            raise NestedAttentionError(f"the data set {name} is empty; choose another one.")

    @property
    def shards(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def caption(self, index: int) -> str:
        return self.captions[index]

    def mark(self, index: int) -> str:
        return f"{self.sizes[index]} {self.bytes[index]} {self.captions[index]}"

    def __getitem__(self, index: int) -> PhotoSample:
        row, name = self.rows[index], called(index, self.name)
        pictures = {part: f"the {part} in {name}" for part in PICTURES}
        image, reference = (read_stored(content(row[part], said), said, WITHOUT) for part, said in pictures.items())
        return PhotoSample(image, reference, self.captions[index], str(index))


def loaded(name: str) -> Any:
    """The rows of the training split, a `datasets.Dataset`, with their pictures not decoded.

    Raises:
        NestedAttentionError: `datasets` is not installed, the data set cannot be loaded, or it lacks a column.
    """
    meant = "" if Path(name).is_dir() else f"there is no folder {name} here, and as a data set: "
    try:
        from datasets import Image, load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise NestedAttentionError(f"{meant}the package datasets is needed to read {name}; `pip install datasets`.") from error
    try:
        if saved_to_disk(Path(name)):
            found = load_from_disk(name)
        elif Path(name).is_dir():
            found = load_dataset(name)
        else:
            repo, _, revision = name.partition("@")
            found = load_dataset(repo, revision=revision or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # the last one of data sets that are made by a script
        raise NestedAttentionError(
            f"{meant}the data set {name} cannot be loaded ({error}); check the name, log in with `hf auth login` if it is private, "
            "and connect once so that it can be fetched."
        ) from error
    if isinstance(found, dict) and "train" not in found:
        raise NestedAttentionError(f"the data set {name} has the splits {', '.join(found)}, but no train; rename the one to train on.")
    rows = found["train"] if isinstance(found, dict) else found
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        way = "rename its columns to image, reference and text"
        if "reference" in missing:
            way = (
                "where references are missing, save its pictures with their texts in a folder, NAME.jpg beside NAME.txt, run "
                "`python -m train.prepare FOLDER`, which makes them, and name what it writes with --data"
            )
        raise NestedAttentionError(f"the data set {name} has no column {', '.join(missing)}, only {', '.join(rows.column_names)}; {way}.")
    rows = rows.select_columns(COLUMNS)
    for column in PICTURES:
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def measured(image: dict[str, Any], reference: dict[str, Any], index: int, name: str) -> dict[str, int]:
    """What has to be known of a row before its turn comes."""
    row = called(index, name)
    height, width = upright_size(io.BytesIO(content(image, f"the image in {row}")), row)
    return {"height": height, "width": width, "reference_bytes": len(content(reference, f"the reference in {row}"))}


def called(index: int, name: str) -> str:
    return f"row {index} of {name}"


def content(stored: dict[str, Any] | None, name: str) -> bytes:
    """The bytes of a picture that `datasets` has not decoded: it gives them, or the path of a file.

    Raises:
        NestedAttentionError: the row has no such picture; `name` is how the message calls it.
    """
    if stored is None:
        raise NestedAttentionError(f"{name} is missing; {WITHOUT}.")
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
