"""Photos in a data set of the Hugging Face `datasets` library, from the Hub or from a folder."""

import io
from pathlib import Path
from typing import Any

from nested_attention.errors import NestedAttentionError
from nested_attention.images import read_image
from train.photos.sample import PhotoSample, checked_caption, upright_size

COLUMNS = ("image", "reference", "text")


def is_dataset(folder: Path) -> bool:
    """True if `datasets` can load `folder`: it was saved to disk or holds Parquet files."""
    return saved_to_disk(folder) or any(folder.rglob("*.parquet"))


def saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


class HubSource:
    """The training split of a data set with the columns image, reference and text.

    `name`: a repo id on the Hub, or a folder.

    Raises:
        NestedAttentionError: `datasets` is not installed, the data set cannot be loaded, or a column is missing.
    """

    def __init__(self, name: str):
        try:
            from datasets import Image, load_dataset, load_from_disk
            from datasets.exceptions import DatasetsError
        except ImportError as error:
            raise NestedAttentionError(f"the package datasets is needed to read {name}; `pip install datasets`.") from error
        try:
            loaded = load_from_disk(name) if saved_to_disk(Path(name)) else load_dataset(name)
        except (DatasetsError, OSError, ValueError) as error:
            raise NestedAttentionError(
                f"the data set {name} cannot be loaded ({error}); check the name, log in with `hf auth login` if it is private, "
                "and connect once so that it can be fetched."
            ) from error
        if isinstance(loaded, dict) and "train" not in loaded:
            raise NestedAttentionError(f"the data set {name} has the splits {', '.join(loaded)}, but no train; rename the one to train on.")
        rows = loaded["train"] if isinstance(loaded, dict) else loaded
        if missing := [column for column in COLUMNS if column not in rows.column_names]:
            raise NestedAttentionError(
                f"the data set {name} has no column {', '.join(missing)}, only {', '.join(rows.column_names)}; "
                "rename its columns to image, reference and text."
            )
        undecoded = Image(decode=False)
        self.name, self.rows = name, rows.select_columns(COLUMNS).cast_column("image", undecoded).cast_column("reference", undecoded)
        self.captions: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        for row in self.rows.select_columns(["image", "text"]):
            called = self.called(len(self.sizes))
            self.captions.append(checked_caption(row["text"] or "", called))
            self.sizes.append(upright_size(io.BytesIO(content(row["image"])), called))
        if not self.sizes:
            raise NestedAttentionError(f"the data set {name} is empty; choose another one.")

    def called(self, index: int) -> str:
        return f"row {index} of {self.name}"

    @property
    def shards(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def caption(self, index: int) -> str:
        return self.captions[index]

    def __getitem__(self, index: int) -> PhotoSample:
        row, called = self.rows[index], self.called(index)
        image = read_image(content(row["image"]), f"the image in {called}")
        reference = read_image(content(row["reference"]), f"the reference in {called}")
        return PhotoSample(image, reference, self.captions[index], str(index))


def content(stored: dict[str, Any]) -> bytes:
    """The bytes of a picture that `datasets` has not decoded: it gives them, or the path of a file."""
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
