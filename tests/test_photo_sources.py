"""Photos for training: the same ones from a folder, a data set and tar shards, in an exact order, in batches of one shape."""

import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from nested_attention import NestedAttentionError
from nested_attention.encoder import CLIP_VIT_H
from tests.photo_files import ROCKET, PartsHandler, rows_of, served
from train.photos import hub, places
from train.photos.batches import BucketBatches
from train.photos.dataset import PhotoDataset, buckets
from train.photos.folder import FolderSource
from train.photos.hub import HubSource
from train.photos.order import MIXED, permutation
from train.photos.sample import PhotoSample, Source
from train.photos.shards import ShardSource, write_shards
from train.photos.sources import open_source
from train.prepare import prepare

SHAPES = [(200, 200), (120, 240), (240, 120), (160, 220), (220, 160), (640, 100), (199, 200)]  # width, height


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of many shapes, prepared as a kind without faces."""
    folder = tmp_path_factory.mktemp("shaped") / "rockets"
    folder.mkdir()
    rows = []
    for k in range(23):
        Image.open(ROCKET).rotate(k).resize(SHAPES[k % len(SHAPES)]).save(folder / f"{k:02d}.jpg")
        rows.append({"file_name": f"{k:02d}.jpg", "text": f"the rocket number {k}"})
    rows[3]["box"] = [0.25, 0.0, 0.75, 1.0]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = folder.with_name("ready")
    prepare(folder, "rocket", out)
    return out


# ---------------------------------------------------------------------------------------------------------- sources


def sharded(prepared: Path, folder: Path, each: int) -> str:
    """The photos of a prepared folder as tar shards, and the pattern that names them."""
    photos = FolderSource(prepared, "rocket").photos
    write_shards(prepared, photos, folder, each)
    return f"{folder}/data-{{000000..{(len(photos) - 1) // each:06d}}}.tar"


def same(a: PhotoSample, b: PhotoSample) -> bool:
    pictures = zip((a.image, a.reference), (b.image, b.reference), strict=True)
    return a.text == b.text and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pictures)


def assert_same_photos(source: Source, expected: Source) -> None:
    assert len(source) == len(expected) == sum(source.shards)
    for k in range(len(expected)):
        assert same(source[k], expected[k]) and source.size(k) == expected.size(k) and source.caption(k) == expected.caption(k)


def test_shards_give_what_the_folder_gives(shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = sharded(shaped, tmp_path / "shards", 5)
    folder, shards = open_source(str(shaped), "rocket"), open_source(pattern, "rocket")
    assert isinstance(folder, FolderSource) and isinstance(shards, ShardSource)
    assert shards.shards == [5, 5, 5, 5, 3] and [shards[k].key for k in (0, 22)] == ["00", "22"]
    assert_same_photos(shards, folder)
    monkeypatch.setattr(tarfile, "open", None)  # from now on the index has to do
    assert_same_photos(open_source(f"{tmp_path}/shards/data-*.tar", "rocket"), folder)


@pytest.mark.parametrize(
    "written",
    [
        {"json": '{"text": "<rocket>!"}'},
        {"json": '{"caption": "<rocket>!"}'},
        {"json": '{"text": "another", "caption": null}', "txt": "<rocket>!"},
        {"txt": "\ufeff<rocket>!", "json": "[]"},
    ],
)
def test_a_caption_may_be_json_where_there_is_no_text(shaped: Path, tmp_path: Path, written: dict[str, str]) -> None:
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for end, text in written.items():  # in this order
            (tmp_path / end).write_text(text)
            tar.add(tmp_path / end, f"one.{end}")
        row = rows_of(shaped)[0]
        for name, content in (("one.jpg", row["file_name"]), ("one.reference.png", row["reference"])):
            tar.add(shaped / content, name)
    photo = open_source(str(tmp_path / "one.tar"), "rocket")[0]
    assert same(photo, replace(FolderSource(shaped, "rocket")[0], text="<rocket>!"))


def test_prepare_writes_shards_that_read_back(shaped: Path, tmp_path: Path) -> None:
    raw = shaped.with_name("rockets")
    with pytest.raises(NestedAttentionError, match="a shard cannot hold 0 photos; give --shards"):
        prepare(raw, "rocket", tmp_path / "ready", shards=0)
    prepare(raw, "rocket", tmp_path / "ready", shards=10)
    assert sorted(path.name for path in (tmp_path / "ready/shards").iterdir()) == [f"data-00000{number}.tar" for number in range(3)]
    assert_same_photos(open_source(f"{tmp_path}/ready/shards/data-*.tar", "rocket"), FolderSource(shaped, "rocket"))


def as_data_set(prepared: Path, folder: Path) -> str:
    """The photos of a prepared folder as a data set that was saved to disk."""
    datasets = pytest.importorskip("datasets")
    rows = rows_of(prepared)
    columns = {
        "image": [str(prepared / row["file_name"]) for row in rows],
        "reference": [str(prepared / row["reference"]) for row in rows],
    }
    made = datasets.Dataset.from_dict({**columns, "text": [row["text"] for row in rows]})
    for column in columns:
        made = made.cast_column(column, datasets.Image())
    made.save_to_disk(str(folder))
    return str(folder)


def test_a_data_set_gives_what_the_folder_gives(shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(as_data_set(shaped, tmp_path / "saved"), "rocket")
    assert isinstance(source, HubSource)
    assert_same_photos(source, FolderSource(shaped, "rocket"))
    monkeypatch.setattr(hub, "upright_size", None)  # sizes are known from the first start
    assert HubSource(str(tmp_path / "saved"), "rocket").sizes == source.sizes


def test_a_damaged_photo_is_named_with_what_takes_it_out(shaped: Path, tmp_path: Path) -> None:
    shutil.copytree(shaped, tmp_path / "ready")
    photo = tmp_path / "ready/images/02.jpg"
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    for data, words in {
        str(tmp_path / "ready"): r"images/02\.jpg in .*ready is damaged .*, remove its line from .*ready/metadata\.jsonl and give",
        sharded(tmp_path / "ready", tmp_path / "shards", 23): r"02 in data-000000\.tar is .*, write data-000000\.tar again without the files of 02",
        as_data_set(tmp_path / "ready", tmp_path / "saved"): r"the image in row 2 of .*saved is .*, save the other rows in a folder .* --data\.",
    }.items():  # fmt: skip
        with pytest.raises(NestedAttentionError, match=words):
            open_source(data, "rocket")[2]


def test_a_data_set_without_references_is_told_what_makes_them(shaped: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.load_from_disk(as_data_set(shaped, tmp_path / "saved"))
    made.remove_columns("reference").save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(NestedAttentionError, match=r"no column reference, only image, text; .*`python -m train\.prepare FOLDER`"):
        open_source(str(tmp_path / "plain"), "rocket")
    made.rename_column("text", "caption").save_to_disk(str(tmp_path / "renamed"))
    with pytest.raises(NestedAttentionError, match=r"no column text, .*; rename its columns to image, reference and text\."):
        open_source(str(tmp_path / "renamed"), "rocket")


def test_a_data_set_may_be_named_at_a_revision(shaped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    row = rows_of(shaped)[0]
    columns = {"image": [str(shaped / row["file_name"])], "reference": [str(shaped / row["reference"])], "text": [row["text"]]}
    made = datasets.Dataset.from_dict(columns)
    for column in ("image", "reference"):
        made = made.cast_column(column, datasets.Image())
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: asked.append((name, revision)) or {"train": made})
    assert len(open_source("somebody/rockets@v2", "rocket")) == len(open_source("somebody/rockets", "rocket")) == 1
    assert asked == [("somebody/rockets", "v2"), ("somebody/rockets", None)]


def test_a_row_without_a_picture_and_a_data_set_by_a_script_are_said(shaped: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.load_from_disk(as_data_set(shaped, tmp_path / "saved")).cast_column("reference", datasets.Image(decode=False))
    rows = [row | {"reference": None} if number == 2 else row for number, row in enumerate(made)]
    datasets.Dataset.from_list(rows, features=made.features).save_to_disk(str(tmp_path / "lost"))
    with pytest.raises(NestedAttentionError, match=r"^the reference in row 2 of .*lost is missing; save the other rows in a folder"):
        open_source(str(tmp_path / "lost"), "rocket")
    (script := tmp_path / "scripted").mkdir()
    for name in ("scripted.py", "rows.parquet"):
        (script / name).touch()
    with pytest.raises(NestedAttentionError, match=r"^the data set .*scripted cannot be loaded \(Dataset scripts are no longer supported"):
        open_source(str(script), "rocket")


def test_what_is_no_source_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "cut.tar").write_bytes(b"x" * 2000)
    for data, words in {
        str(tmp_path): f"run `python -m train.prepare {tmp_path} --kind person` and give", "/nowhere/at/all": "shards: data-", f"{tmp_path}/{{0..3}}.tar": "there is no file .*0.tar",
        f"{tmp_path}/cut.tar": "damaged or compressed", "somebody/photos": "^there is no folder somebody/photos here, and as a data set: the package datasets is needed .*; `pip install datasets`",
    }.items():  # fmt: skip
        with pytest.raises(NestedAttentionError, match=words):
            open_source(data, "person")


def test_photos_of_another_kind_are_refused(shaped: Path, tmp_path: Path) -> None:
    pattern = sharded(shaped, tmp_path / "shards", 12)
    for data in (str(shaped), pattern):
        with pytest.raises(NestedAttentionError, match=r"names <rocket>: .*; write <person>, .* or train with --kind rocket\."):
            open_source(data, "person")


@pytest.mark.parametrize(("text", "words"), [("a rocket", "no placeholder"), ("<rocket> by <person>", "<rocket>, <person>")])
def test_captions_that_do_not_name_the_subject_alone_are_refused(shaped: Path, tmp_path: Path, text: str, words: str) -> None:
    shutil.copytree(shaped, tmp_path / "ready")
    rows = rows_of(shaped)
    rows[2]["text"] = text
    (tmp_path / "ready/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = rf'the caption of line 3 of .*metadata\.jsonl names {words}: "{text}"; write <rocket>, and no other one, where the subject is meant\.'
    with pytest.raises(NestedAttentionError, match=said):
        open_source(str(tmp_path / "ready"), "rocket")


def test_a_shard_with_half_a_photo_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROCKET, tmp_path / "one.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "one.jpg", "one.jpg")
    with pytest.raises(NestedAttentionError, match=r"one in a\.tar has no caption and no reference"):
        open_source(str(tmp_path / "a.tar"), "rocket")


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[PartsHandler]]]:
    """The address of a server of `tmp_path / "shards"`, and its handler; indices are kept in `tmp_path / "home"`."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(places.time, "sleep", lambda seconds: None)
    with served(tmp_path / "shards") as found:
        yield found


def test_shards_on_a_server_are_read_in_parts(shaped: Path, tmp_path: Path, web: tuple[str, type[PartsHandler]]) -> None:
    address, handler = web
    pattern = sharded(shaped, tmp_path / "shards", 12).replace(f"{tmp_path}/shards", address)
    total = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    handler.failures = 2  # what fails for the moment is asked for again
    source = open_source(pattern, "rocket")
    assert handler.served < 1.1 * total  # once through
    assert_same_photos(source, FolderSource(shaped, "rocket"))
    handler.served = 0
    again = open_source(pattern, "rocket")
    assert handler.served == 2  # a byte of each shard, to see that it has not changed
    again[3]
    assert handler.served < total / 4
    assert len(list((tmp_path / "home/nested_attention/shards").iterdir())) == 2


@pytest.mark.parametrize(
    ("status", "excuse", "waits"), [(429, "7", 7), (429, "86400", 60), (408, "", 1), (503, "Wed, 21 Oct 2026 07:28:00 GMT", 1)]
)
def test_a_busy_server_is_asked_again_when_it_wishes(
    shaped: Path, tmp_path: Path, web: tuple[str, type[PartsHandler]], monkeypatch: pytest.MonkeyPatch, status: int, excuse: str, waits: float
) -> None:  # fmt: skip
    address, handler = web
    waited: list[float] = []
    monkeypatch.setattr(places.time, "sleep", waited.append)
    sharded(shaped, tmp_path / "shards", 23)
    handler.failures, handler.failure, handler.excuse = 1, status, {"Retry-After": excuse} if excuse else {}
    assert len(open_source(f"{address}/data-000000.tar", "rocket")) == 23
    assert waited == [waits]


def test_what_a_server_does_not_give_is_said(shaped: Path, tmp_path: Path, web: tuple[str, type[PartsHandler]]) -> None:
    address, handler = web
    sharded(shaped, tmp_path / "shards", 12)
    with pytest.raises(NestedAttentionError, match=r"none\.tar cannot be read \(HTTP Error 404.*check the address"):
        open_source(f"{address}/none.tar", "rocket")
    with pytest.raises(NestedAttentionError, match=r"write their numbers as \{000000\.\.000012\}"):
        open_source(f"{address}/data-*.tar", "rocket")
    handler.whole = True
    with pytest.raises(NestedAttentionError, match="only as a whole; download it"):
        open_source(f"{address}/data-000000.tar", "rocket")


# -------------------------------------------------------------------------------------------------- order and batches


def test_every_photo_comes_once_an_epoch_in_an_order_of_seed_and_epoch() -> None:
    first, second, other = permutation((7, 3, 5), 0, 0), permutation((7, 3, 5), 0, 1), permutation((7, 3, 5), 1, 0)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(15))
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    permutation.cache_clear()
    assert np.array_equal(permutation((7, 3, 5), 0, 0), first)


def test_only_a_few_shards_are_read_at_a_time() -> None:
    order = permutation((100,) * 40, 3, 0)
    assert all(len({photo // 100 for photo in order[k : k + MIXED * 100]}) == MIXED for k in range(0, 4000, MIXED * 100))


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024])
def test_buckets_have_about_the_same_area_and_sides_in_steps_of_64(resolution: int) -> None:
    sizes = buckets(resolution)
    assert (resolution, resolution) in sizes and len(sizes) == len(set(sizes)) >= 3
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and 0.5 <= height / width <= 2 and (width, height) in sizes
        assert 0.85 <= height * width / resolution**2 <= 1
    with pytest.raises(NestedAttentionError, match="multiple of 64"):
        buckets(resolution - 1)


def test_an_item_is_a_function_of_its_index(shaped: Path) -> None:
    one, two = (PhotoDataset(FolderSource(shaped, "rocket"), 256, CLIP_VIT_H, seed=4) for _ in range(2))
    for index in (40, 3, 1000):
        item, again = one[index], two[index]
        assert all(torch.equal(item[key], again[key]) for key in item) and one.caption(index) == two.caption(index)
        assert item["pixels"].shape == (3, *item["target"]) and item["reference"].shape == (3, 224, 224)
        assert item["pixels"].abs().max() <= 1 and item["pixels"].min() < -0.5
    strip = next(k for k in range(23) if tuple(one[k]["size"]) == (100, 640))
    corners = {int(one[k]["crop"][1]) for k in (strip, *(n for n in range(23, 230) if one.order[n] == one.order[strip]))}
    assert tuple(one[strip]["target"]) == (192, 320) and len(corners) > 3
    assert "<rocket> number" in one.caption(strip)


def test_batches_hold_one_shape_and_every_photo_counts_the_same(shaped: Path) -> None:
    dataset = PhotoDataset(FolderSource(shaped, "rocket"), 256, CLIP_VIT_H)
    batches = list(islice(BucketBatches(dataset, 4), 300))
    assert all(len(batch) == 4 and len({dataset.bucket_numbers[dataset.order[k]] for k in batch}) == 1 for batch in batches)
    counts = np.bincount([dataset.order[k] for batch in batches for k in batch], minlength=23)
    assert counts.max() - counts.min() <= 4 and len({k for batch in batches for k in batch}) == 1200
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(dataset, batch_sampler=BucketBatches(dataset, 4))  # type: ignore[arg-type]
    assert next(iter(loader))["pixels"].shape == (4, 3, *dataset.buckets[dataset.bucket_numbers[dataset.order[batches[0][0]]]])


def test_processes_together_do_what_one_does_and_a_run_resumes_where_it_stopped(shaped: Path) -> None:
    dataset = PhotoDataset(FolderSource(shaped, "rocket"), 256, CLIP_VIT_H, seed=1)
    alone = list(islice(BucketBatches(dataset, 4), 40))
    ranks = [list(islice(BucketBatches(dataset, 4, rank, 2), 40)) for rank in range(2)]
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*ranks, strict=True)] == alone
    assert list(islice(BucketBatches(dataset, 4, first=17), 23)) == alone[17:]
    with pytest.raises(NestedAttentionError, match="cannot be divided among 3 processes"):
        BucketBatches(dataset, 4, processes=3)
