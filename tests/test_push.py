"""`train.push` against a Hub of our own over real HTTP: what is uploaded, resuming, refusals, and that the token stays secret."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from nested_attention import NestedAttentionError
from nested_attention.adapters import CONFIG, WEIGHTS, Adapter, read_config
from nested_attention.encoding import ImageEncoders
from nested_attention.hub import commit_of
from tests import tiny
from tests.hub_server import HubServer, visit
from train.push import CARD, main, published

TOKEN = "hf_ThisTokenMayNeverBeSeenAnywhere"
FILES = {"README.md", CONFIG, WEIGHTS, "image_encoder/config.json", "image_encoder/model.safetensors"} | {
    f"grids/{step:06d}.png" for step in (100, 300, 400)
}
LOAD = """
import sys
import torch
from safetensors.torch import save_file
from nested_attention import NestedAttentionPipeline
pipe = NestedAttentionPipeline.from_pretrained(sys.argv[1], adapter="me/cat", device="cpu", dtype=torch.float32)
adapter = pipe.adapters["cat"]
parts = {"adapter": adapter, "encoder": pipe.image_encoders.get(adapter.config)}
save_file({f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}, sys.argv[2])
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKEN) as server:
        yield server


@pytest.fixture
def here(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """This process as one of a person who is logged in to `hub`."""
    visit(hub, monkeypatch, tmp_path / "home")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return monkeypatch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 400 steps as `train.adapter` leaves it, with the image encoder where its config says."""
    folder = tmp_path / "runs/adapter-cat"
    made = tiny.adapter(tiny.stock("sd").unet, "cat")
    made.config = replace(made.config, base="sd15", image_encoder="../../image_encoder", metrics={"last loss": 0.1, "held-out loss": 0.09})
    made.save(folder / "adapter")
    tiny.vision().save_pretrained(tmp_path / "runs/image_encoder")
    (folder / "config.json").write_text(json.dumps({"loop": {"steps": 400, "batch_size": 48}, "processes": 2, "data": "pictures of Tom"}))
    lines = [{"step": step, "loss": 0.5 - step / 1000, "samples_per_s": 13.1, "hours": step / 800} for step in (100, 200, 300, 400)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "grids").mkdir()
    for step in (100, 200, 300, 400):
        Image.new("RGB", (8, 8), (step % 256, 0, 0)).save(folder / f"grids/{step:06d}.png")
    return folder


def push(here: pytest.MonkeyPatch, *arguments: object) -> str:
    """Calls the command in this process. Returns the message that it ends with, or nothing."""
    here.setattr(sys, "argv", ["train.push", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return str(stopped.code)
    return ""


def command(hub: HubServer, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python as a process of its own, logged in by the token file that `hf auth login` writes."""
    (home / "token").parent.mkdir(exist_ok=True)
    (home / "token").write_text(TOKEN)
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | ours
    return subprocess.run([sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_dry_run_writes_a_folder_that_loads_and_calls_nobody(run: Path, here, hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert push(here, run, "me/cat", "--dry-run", "--out", out) == ""
    assert hub.requests == []
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == FILES
    assert (out / WEIGHTS).read_bytes() == (run / "adapter" / WEIGHTS).read_bytes()
    config = read_config(out)
    assert config == replace(read_config(run / "adapter"), image_encoder="image_encoder")
    assert Adapter.load(out, tiny.stock("sd").unet).config == config
    encoder = ImageEncoders({"cat": out}, torch.device("cpu"), torch.float32).get(config)
    assert all(torch.equal(value, tiny.vision().state_dict()[name]) for name, value in encoder.state_dict().items())


def test_an_interrupted_push_resumes_and_the_repo_loads_bit_equal(
    run: Path, here, hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home, encoder = tmp_path / "home", sha256(run.parent / "image_encoder/model.safetensors")
    hub.fail_once(f"PUT /storage/{encoder}", 507)
    first = command(hub, home, "-m", "train.push", run, "me/cat")
    assert first.returncode == 1 and "Traceback" not in first.stderr
    sentence = "the Hub refused me/cat (status 507); try again later, or log in with `hf auth login`."
    assert [line for line in first.stderr.splitlines() if "Hub" in line] == [sentence]
    assert set(hub.blobs) == {sha256(run / "adapter" / WEIGHTS)} and hub.repos["me/cat"].files == {}

    before = len(hub.requests)
    assert push(here, run, "me/cat") == ""
    second = capfd.readouterr()
    assert [request for request in hub.requests[before:] if request.startswith("PUT")] == [f"PUT /storage/{encoder}"]
    repo = hub.repos["me/cat"]
    assert repo.private and set(repo.files) == FILES
    assert f"{hub.url}/me/cat (private), revision to pin: {repo.head}" in second.out
    assert 'NestedAttentionPipeline.from_pretrained("sd15", adapter="me/cat")' in second.out
    text = repo.files["README.md"].content.decode()
    for part in (
        "license: mit", "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5", "library_name: nested-attention", "- cat\n",
        "| steps | 400 |", "| batch size | 48 |", "| hours | 0.5 |", "| last loss | 0.1 |", "| held-out loss | 0.09 |", "| data | pictures of Tom |",
        "(grids/000400.png)", 'adapter="me/cat"', "MIT, for the adapter", "CreativeML Open RAIL-M",
    ):  # fmt: skip
        assert part in text

    before = len(hub.requests)
    assert push(here, run, "me/cat") == ""
    assert not [request for request in hub.requests[before:] if "/storage/" in request or "/commit/" in request]

    base, found = tmp_path / "base", tmp_path / "found.safetensors"
    tiny.stock("sd").save_pretrained(base)
    loaded = command(hub, home, "-c", LOAD, base, found)
    assert loaded.returncode == 0, loaded.stderr
    wanted = {f"adapter.{name}": value for name, value in load_file(run / "adapter" / WEIGHTS).items()}
    wanted |= {f"encoder.{name}": value for name, value in tiny.vision().state_dict().items()}
    got = load_file(found)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value.float()) for name, value in wanted.items())

    outputs = [first.stdout, first.stderr, second.out, second.err, loaded.stdout, loaded.stderr, *capfd.readouterr()]
    assert not any(TOKEN in output for output in outputs)
    seen = [path for path in tmp_path.rglob("*") if path.is_file() and path != home / "token" and TOKEN.encode() in path.read_bytes()]
    assert seen == []


def test_public_is_said_and_changes_a_private_repo(run: Path, here, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(here, run, "me/cat") == ""
    assert hub.repos["me/cat"].private and "(private)" in capsys.readouterr().out
    assert push(here, run, "me/cat", "--public") == ""
    assert not hub.repos["me/cat"].private and "(public)" in capsys.readouterr().out
    assert len(hub.repos["me/cat"].commits) == 2


@pytest.mark.parametrize(
    ("failing", "status", "words"),
    [
        ("POST /api/repos/create", 401, "the Hub refused me/cat (status 401); log in with `hf auth login`"),
        ("POST /api/repos/create", 500, "the Hub refused me/cat (status 500); try again later"),
        (
            "POST /api/models/me/cat/preupload",
            403,
            "the Hub refused me/cat (status 403); log in with `hf auth login` with a token that may",
        ),
        ("POST /api/models/me/cat/commit", 503, "the Hub refused me/cat (status 503); try again later"),
    ],
)
def test_every_refusal_is_one_sentence(failing: str, status: int, words: str, run: Path, here, hub: HubServer) -> None:
    hub.fail_once(failing, status)
    said = push(here, run, "me/cat")
    assert said.startswith(words) and "\n" not in said
    assert push(here, run, "me/cat") == ""
    assert set(hub.repos["me/cat"].files) == FILES


def test_tokens_that_may_not_and_hubs_that_are_away_are_said(run: Path, here, hub: HubServer) -> None:
    assert push(here, run, "somebody/cat").startswith("the Hub refused somebody/cat (status 403); log in")
    here.setenv("HF_TOKEN", "hf_wrong")
    said = push(here, run, "me/cat")
    assert said.startswith("the Hub refused me/cat (status 401); log in") and "hf_wrong" not in said
    here.delenv("HF_TOKEN")
    assert push(here, run, "me/cat").startswith("the Hub refused me/cat (status 401); log in")
    with HubServer(TOKEN) as gone:
        here.setattr(constants, "ENDPOINT", gone.url)
    assert push(here, run, "me/cat").startswith("the Hub cannot be reached, or the upload to me/cat broke off; run the same command again")
    with pytest.raises(NestedAttentionError, match="cannot be reached"):
        commit_of("me/cat")


def test_a_card_that_the_hub_does_not_accept_is_said(run: Path, here, hub: HubServer) -> None:
    config = json.loads((run / "adapter" / CONFIG).read_text())
    (run / "adapter" / CONFIG).write_text(json.dumps(config | {"licence": "as you like"}))
    assert 'the Hub does not accept the model card (Invalid metadata in README.md. - "license" with value' in push(here, run, "me/cat")
    assert hub.repos["me/cat"].files == {}


def test_a_base_that_is_on_no_hub_is_no_base_model_of_the_card(run: Path, here) -> None:
    config = json.loads((run / "adapter" / CONFIG).read_text())
    (run / "adapter" / CONFIG).write_text(json.dumps(config | {"base": "storybook"}))
    made = json.loads((run / "config.json").read_text())
    del made["data"]
    (run / "config.json").write_text(json.dumps(made | {"start": {"folder": "/home/me/runs/keys-cat/adapter", "files": "0"}}))
    assert push(here, run, "me/cat", "--dry-run") == ""
    text = (run / "push/README.md").read_text()
    assert "base_model" not in text and "`storybook`, which comes with the code" in text
    assert "drawn on the fly" in text and "| started from | `keys-cat` |" in text


def test_faces_are_framed_as_the_card_shows_and_stages_add_up(run: Path, here) -> None:
    config = json.loads((run / "adapter" / CONFIG).read_text())
    (run / "adapter" / CONFIG).write_text(json.dumps(config | {"framing": "face", "licence": "CC-BY-4.0", "credit": "the weights of Ann"}))
    (run / "stage-1").mkdir()
    (run / "stage-1/config.json").write_text(json.dumps({"loop": {"steps": 1000, "batch_size": 64}, "processes": 1}))
    (run / "stage-1/log.jsonl").write_text(json.dumps({"step": 1000, "loss": 0.7, "hours": 2.25}) + "\n")
    (run / "stage-1/grids").mkdir()
    (run / "grids/000100.png").rename(run / "stage-1/grids/000500.png")
    assert push(here, run, "me/cat", "--dry-run") == ""
    text = (run / "push/README.md").read_text()
    for part in (
        "from nested_attention.faces import frame\nfrom nested_attention.images import read_image\n",
        'pipe.encode("cat", frame(read_image("picture.png"), "cat").image)',
        "| steps | 1,400 (1,000 + 400) |", "| batch size | 64 and 48 |", "| hours | 2.75 |", "| processes | 1 and 2 |", "CC-BY-4.0, for the adapter. It was made of the weights of Ann.", "| last loss | 0.1 |", "Step 500:", "Step 1,400:",
    ):  # fmt: skip
        assert part in text
    assert sorted(path.name for path in (run / "push/grids").iterdir()) == ["000500.png", "001300.png", "001400.png"]


def test_a_base_and_photos_in_folders_are_known_by_their_last_names(run: Path, here, tmp_path: Path) -> None:
    tiny.stock("sd").save_pretrained(tmp_path / "my-base")
    config = json.loads((run / "adapter" / CONFIG).read_text())
    (run / "adapter" / CONFIG).write_text(json.dumps(config | {"base": str(tmp_path / "my-base")}))
    made = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(made | {"data": str(tmp_path / "anna-prepared")}))
    assert push(here, run, "me/cat", "--dry-run") == ""
    text = (run / "push/README.md").read_text()
    assert "`my-base`, a folder of the one who trained this" in text and "base_model" not in text
    assert "| data | anna-prepared |" in text and read_config(run / "push").base == "my-base"
    assert not [file for file in (run / "push").rglob("*") if file.is_file() and str(tmp_path).encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("/home/me/photos/anna-prepared/", "anna-prepared"),
        ("runs/../shards/data-{000000..000012}.tar", "data-{000000..000012}.tar"),
        ("me/photos", "photos"),
        ("me/others@v2", "me/others@v2"),
        ("https://server/data-000000.tar", "https://server/data-000000.tar"),
    ],
)
def test_of_what_lies_here_no_path_is_published(data: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me/photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert published(data) == said


def test_only_a_folder_of_an_earlier_push_is_replaced_and_never_by_half_of_one(run: Path, here, tmp_path: Path) -> None:
    assert "was not written by train.push; remove it" in push(here, run, "me/cat", "--dry-run", "--out", tmp_path)
    assert push(here, run, "me/cat", "--dry-run") == ""
    before = sorted(path for path in run.rglob("*"))
    (run / "push" / CARD).write_text("older")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copy", full)
        assert f"{run / 'push'} cannot be written ([Errno 28]" in push(here, run, "me/cat", "--dry-run")
    assert sorted(path for path in run.rglob("*")) == before and (run / "push" / CARD).read_text() == "older"


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_run_lacks_is_named(run: Path, here, tmp_path: Path) -> None:
    assert "'cat' is not a repo id of the form user/name" in push(here, run, "cat", "--dry-run")
    (run.parent / "image_encoder").rename(tmp_path / "elsewhere")
    assert "name its folder by --image-encoder" in push(here, run, "me/cat", "--dry-run")
    assert push(here, run, "me/cat", "--dry-run", "--image-encoder", tmp_path / "elsewhere") == ""
    assert CLIPVisionModelWithProjection.from_pretrained(run / "push/image_encoder").config.image_size == 32
    (run / "log.jsonl").write_text("{")
    assert "is damaged" in push(here, run, "me/cat", "--dry-run")
    (run / "adapter" / WEIGHTS).unlink()
    assert "holds no finished adapter" in push(here, run, "me/cat", "--dry-run")
