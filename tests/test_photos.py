"""Real photos for training: what is prepared and what is left out, the same photos from every source, in an exact order."""

import io
import json
import shutil
import sys
import tarfile
from importlib.resources import files
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nested_attention import NestedAttentionError
from nested_attention.encoder import CLIP_VIT_H
from nested_attention.faces import FRAME, find_faces
from train.photos.batches import BucketBatches
from train.photos.captions import with_placeholder
from train.photos.dataset import PhotoDataset, buckets
from train.photos.folder import FolderSource
from train.photos.hub import HubSource
from train.photos.order import MIXED, permutation
from train.photos.sample import PhotoSample, Source
from train.photos.shards import ShardSource
from train.photos.sources import open_source
from train.prepare import prepare


def photo(package: str, name: str) -> Path:
    return Path(str(files(package).joinpath(name)))


ASTRONAUT, CHELSEA, ROCKET = (
    photo("skimage", "data/astronaut.png"),
    photo("skimage", "data/chelsea.png"),
    photo("skimage", "data/rocket.jpg"),
)
GROUP, PORTRAIT = photo("insightface", "data/images/t1.jpg"), photo("insightface", "data/images/Tom_Hanks_54745.png")
SHAPES = [(200, 200), (120, 240), (240, 120), (160, 220), (220, 160), (640, 100), (199, 200)]  # width, height


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


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


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


# ---------------------------------------------------------------------------------------------------------- sources


def write_shards(prepared: Path, folder: Path, each: int) -> str:
    """The photos of a prepared folder as tar shards; every other caption as JSON."""
    folder.mkdir()
    rows = rows_of(prepared)
    for k, row in enumerate(rows):
        key = Path(row["file_name"]).stem
        caption = (f"{key}.json", json.dumps({"text": row["text"]})) if k % 2 else (f"{key}.txt", row["text"])
        content = {
            f"{key}.jpg": (prepared / row["file_name"]).read_bytes(), f"{key}.reference.png": (prepared / row["reference"]).read_bytes(),
            caption[0]: caption[1].encode(),
        }  # fmt: skip
        with tarfile.open(folder / f"data-{k // each:06d}.tar", "a") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return f"{folder}/data-{{000000..{(len(rows) - 1) // each:06d}}}.tar"


def same(a: PhotoSample, b: PhotoSample) -> bool:
    pictures = zip((a.image, a.reference), (b.image, b.reference), strict=True)
    return a.text == b.text and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pictures)


def assert_same_photos(source: Source, expected: Source) -> None:
    assert len(source) == len(expected) == sum(source.shards)
    for k in range(len(expected)):
        assert same(source[k], expected[k]) and source.size(k) == expected.size(k) and source.caption(k) == expected.caption(k)


def test_shards_give_what_the_folder_gives(shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(shaped, tmp_path / "shards", 5)
    folder, shards = open_source(str(shaped)), open_source(pattern)
    assert isinstance(folder, FolderSource) and isinstance(shards, ShardSource)
    assert shards.shards == [5, 5, 5, 5, 3] and [shards[k].key for k in (0, 22)] == ["00", "22"]
    assert_same_photos(shards, folder)
    monkeypatch.setattr(tarfile, "open", None)  # from now on the index has to do
    assert_same_photos(open_source(f"{tmp_path}/shards/data-*.tar"), folder)


def test_a_data_set_gives_what_the_folder_gives(shaped: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = rows_of(shaped)
    columns = {"image": [str(shaped / row["file_name"]) for row in rows], "reference": [str(shaped / row["reference"]) for row in rows]}
    made = datasets.Dataset.from_dict({**columns, "text": [row["text"] for row in rows]})
    for column in columns:
        made = made.cast_column(column, datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"))
    assert isinstance(source, HubSource)
    assert_same_photos(source, FolderSource(shaped))


def test_what_is_no_source_is_said(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "cut.tar").write_bytes(b"x" * 2000)
    for data, words in {
        str(people): "run `python -m train.prepare", "/nowhere/at/all": "shards: data-", f"{tmp_path}/{{0..3}}.tar": "there is no file .*0.tar",
        f"{tmp_path}/cut.tar": "damaged or compressed", "somebody/photos": "pip install datasets",
    }.items():  # fmt: skip
        with pytest.raises(NestedAttentionError, match=words):
            open_source(data)


def test_a_shard_with_half_a_photo_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROCKET, tmp_path / "one.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "one.jpg", "one.jpg")
    with pytest.raises(NestedAttentionError, match=r"one in a\.tar has no caption and no reference"):
        open_source(str(tmp_path / "a.tar"))


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
    one, two = (PhotoDataset(FolderSource(shaped), 256, CLIP_VIT_H, seed=4) for _ in range(2))
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
    dataset = PhotoDataset(FolderSource(shaped), 256, CLIP_VIT_H)
    batches = list(islice(BucketBatches(dataset, 4), 300))
    assert all(len(batch) == 4 and len({dataset.bucket_numbers[dataset.order[k]] for k in batch}) == 1 for batch in batches)
    counts = np.bincount([dataset.order[k] for batch in batches for k in batch], minlength=23)
    assert counts.max() - counts.min() <= 4 and len({k for batch in batches for k in batch}) == 1200
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(dataset, batch_sampler=BucketBatches(dataset, 4))  # type: ignore[arg-type]
    assert next(iter(loader))["pixels"].shape == (4, 3, *dataset.buckets[dataset.bucket_numbers[dataset.order[batches[0][0]]]])


def test_processes_together_do_what_one_does_and_a_run_resumes_where_it_stopped(shaped: Path) -> None:
    dataset = PhotoDataset(FolderSource(shaped), 256, CLIP_VIT_H, seed=1)
    alone = list(islice(BucketBatches(dataset, 4), 40))
    ranks = [list(islice(BucketBatches(dataset, 4, rank, 2), 40)) for rank in range(2)]
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*ranks, strict=True)] == alone
    assert list(islice(BucketBatches(dataset, 4, first=17), 23)) == alone[17:]
    with pytest.raises(NestedAttentionError, match="cannot be divided among 3 processes"):
        BucketBatches(dataset, 4, processes=3)
