"""The Hub as a source of bases and encoders, by a stand-in: what is fetched and what not, what is here, and every refusal."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download

from nested_attention import NestedAttentionError
from nested_attention.bases import ASSETS, BASES, Base, find_base
from nested_attention.encoding import ImageEncoders
from nested_attention.errors import get_back
from nested_attention.estimate import adapter_here, missing_gigabytes
from nested_attention.hub import commit_of, fetch, record_file, recorded_commits, spoken_errors
from nested_attention.loading import base_folder, few_steps_folder, load_base
from tests import tiny
from tests.hub_server import Answer, HubServer, refused, visit
from tests.room import no_file_beyond

REPO = "somebody/something"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer("token") as server:
        visit(server, monkeypatch, tmp_path / "home")
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fetched(hub: HubServer) -> set[str]:
    """The files whose contents were asked for since the last call."""
    paths = {request.partition("/resolve/")[2].partition("/")[2] for request in hub.requests if request.startswith("GET")}
    hub.requests.clear()
    return paths - {""}


@pytest.fixture
def both_widths(hub: HubServer, tmp_path: Path) -> dict[str, bytes]:
    """A repo as large ones are: every part in 32 and in 16 bit, and much that no one needs."""
    stock = tiny.stock("sdxl")
    for variant in (None, "fp16"):
        stock.save_pretrained(tmp_path / "stock", variant=variant)
    files = contents(tmp_path / "stock")
    more = "README.md", "whole.safetensors", "vae_1_0/model.fp16.safetensors", "unet/model.bin", "unet/model.non_ema.safetensors"
    hub.publish(REPO, files | dict.fromkeys(more, b"large"))
    return files


def weights(files: set[str]) -> set[str]:
    return {path for path in files if path.endswith("safetensors")}


MODELS = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_each_part_one_set_of_safetensors_is_fetched(variant: str | None, both_widths: dict[str, bytes], hub: HubServer) -> None:
    folder = base_folder(replace(find_base(REPO), variant=variant))
    ending = ".safetensors" if variant is None else ".fp16.safetensors"
    assert weights(fetched(hub)) == {model + ending for model in MODELS}
    assert set(contents(folder)) == {model + ending for model in MODELS} | both_widths.keys() - weights(set(both_widths))


def test_a_repo_with_nothing_but_weights_in_16_bit_loads(both_widths: dict[str, bytes], hub: HubServer) -> None:
    hub.publish(REPO, {path: content for path, content in both_widths.items() if not path.endswith("model.safetensors")})
    preset, stock = load_base(REPO, torch.float32)
    assert weights(fetched(hub)) == {f"{model}.fp16.safetensors" for model in MODELS}
    assert torch.equal(stock.unet.conv_in.weight, tiny.stock("sdxl").unet.conv_in.weight)
    assert preset.licence == "see its page on the Hub"


def test_a_repo_with_nothing_but_pickles_is_named(both_widths: dict[str, bytes], hub: HubServer) -> None:
    pickled = {path.replace("unet/diffusion_pytorch_model.", "unet/model.bin."): content for path, content in both_widths.items()}
    hub.publish(REPO, {path: content for path, content in pickled.items() if "unet/" not in path or path.endswith("json")})
    with pytest.raises(NestedAttentionError, match=f"{REPO} has no safetensors for unet, and .* not read; choose another repo or revision"):
        load_base(REPO, torch.float32)


@pytest.mark.parametrize(("architecture", "name"), [("FluxPipeline", "Flux"), ("StableDiffusion3Pipeline", "StableDiffusion3")])
def test_another_architecture_is_named_before_anything_large_is_fetched(architecture: str, name: str, hub: HubServer) -> None:
    index = json.dumps({"_class_name": architecture, "transformer": ["diffusers", "Transformer2DModel"]}).encode()
    hub.publish(REPO, {"model_index.json": index, "transformer/diffusion_pytorch_model.safetensors": b"large"})
    with pytest.raises(NestedAttentionError, match=f"{REPO} is a {name} model; adapters here"):
        load_base(REPO, torch.float32)
    assert fetched(hub) == {"model_index.json"}


def test_a_repo_that_is_no_pipeline_is_named(hub: HubServer) -> None:
    hub.publish(REPO, {"README.md": b"a LoRA"})
    with pytest.raises(NestedAttentionError, match=r"something has no model_index\.json"):
        load_base(REPO, torch.float32)


def test_a_base_of_the_other_architecture_keeps_what_was_asked_for(hub: HubServer, tmp_path: Path) -> None:
    tiny.stock("sd").save_pretrained(tmp_path / "stock")
    commit = hub.publish(REPO, contents(tmp_path / "stock"))
    preset, _ = load_base(f"{REPO}@{commit}", torch.float32)
    assert (preset.pipeline, preset.steps) == ("StableDiffusionPipeline", BASES["sd15"].steps)
    assert (preset.source, preset.revision, preset.licence) == (REPO, commit, "see its page on the Hub")


def test_half_a_download_is_not_here(both_widths: dict[str, bytes], hub: HubServer) -> None:
    lora = replace(BASES["sdxl-lcm"].few_steps, repo="somebody/lora")  # type: ignore[type-var]
    hub.publish("somebody/lora", {lora.file: b"lora"})
    base: Base = replace(find_base(REPO), gigabytes=6.9, few_steps=lora)
    assert missing_gigabytes(base) == pytest.approx(6.9 + lora.gigabytes)
    assert hub.requests == []
    fetch(REPO, None, ["*.json", "unet/*.safetensors"])
    hub.requests.clear()
    assert missing_gigabytes(base) == pytest.approx(6.9 + lora.gigabytes)
    base_folder(base)
    hub.requests.clear()
    assert missing_gigabytes(base) == pytest.approx(lora.gigabytes)
    few_steps_folder(lora)
    hub.requests.clear()
    assert missing_gigabytes(base) == 0
    assert hub.requests == []


def forget_listings() -> None:
    """Of a cache that an older library filled nobody knows what else the repos have."""
    for listing in Path(constants.HF_HUB_CACHE).glob("models--*/trees/*.json"):
        listing.unlink()


def test_what_an_older_library_left_is_looked_through(both_widths: dict[str, bytes], hub: HubServer) -> None:
    lora = replace(BASES["sdxl-lcm"].few_steps, repo="somebody/lora", gigabytes=0.5)  # type: ignore[type-var]
    hub.publish("somebody/lora", {"README.md": b"", lora.file: b"lora"})
    base = replace(find_base(REPO), variant="fp16", gigabytes=6.0, few_steps=lora)
    fetch("somebody/lora", None, ["README.md"])
    for patterns in (["model_index.json"], ["*.json", "*.txt", "unet/*.fp16.safetensors"], ["*.json", "*model.safetensors"]):
        fetch(REPO, None, patterns)
        forget_listings()
        assert missing_gigabytes(base) == 6.5
    base_folder(base)
    forget_listings()
    assert missing_gigabytes(base) == 0.5
    few_steps_folder(lora)
    forget_listings()
    assert missing_gigabytes(base) == 0
    hub.publish("me/cat", {"config.json": b"{}", "adapter.safetensors": b"", "README.md": b""})
    for name in ("README.md", "config.json"):
        fetch("me/cat", None, [name])
        forget_listings()
        assert adapter_here("me/cat") is None
    folder = fetch("me/cat", None, ["adapter.safetensors"])
    forget_listings()
    assert adapter_here("me/cat") == folder


@pytest.mark.parametrize("subfolder", ["", "models/image_encoder"])
def test_of_an_image_encoder_only_what_is_loaded_is_fetched(subfolder: str, hub: HubServer, tmp_path: Path) -> None:
    tiny.vision().save_pretrained(tmp_path / "vision")
    below = f"{subfolder}/" if subfolder else ""
    files = {below + path: content for path, content in contents(tmp_path / "vision").items()}
    hub.publish(
        REPO, files | dict.fromkeys((f"{below}pytorch_model.bin", f"{below}open_clip_model.safetensors", "other/model.safetensors"), b"")
    )
    config = replace(tiny.adapter(tiny.stock("sd").unet, "cat").config, image_encoder=REPO, image_subfolder=subfolder)
    encoders = ImageEncoders({"cat": tmp_path}, torch.device("cpu"), torch.float32)
    encoder = encoders.get(config)
    assert fetched(hub) == {f"{below}config.json", f"{below}model.safetensors"}
    assert encoders.get(config) is encoder
    assert torch.equal(encoder.visual_projection.weight, tiny.vision().visual_projection.weight)


def test_image_encoders_of_one_repo_are_told_apart(hub: HubServer, tmp_path: Path) -> None:
    files = {}
    for size in (32, 64):
        tiny.vision(size).save_pretrained(tmp_path / str(size))
        files |= {f"{size}/{path}": content for path, content in contents(tmp_path / str(size)).items()}
    hub.publish(REPO, files)
    encoders = ImageEncoders({"cat": tmp_path}, torch.device("cpu"), torch.float32)
    config = replace(tiny.adapter(tiny.stock("sd").unet, "cat").config, image_encoder=REPO)
    assert [encoders.get(replace(config, image_subfolder=str(size))).config.image_size for size in (32, 64)] == [32, 64]


def test_an_unknown_repo_is_named(hub: HubServer) -> None:
    for ask in (lambda: commit_of(REPO), lambda: fetch(REPO, "0" * 40, ["*.json"])):
        with pytest.raises(NestedAttentionError, match=f"there is no repo {REPO} on the Hub, or it is private; check the name"):
            ask()


def test_a_gated_repo_asks_for_consent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(REPO, {"config.json": b"{}"})
    monkeypatch.setattr(hub, "answer", lambda *_: refused(403, "Access to model is restricted", "GatedRepo"))
    for ask in (lambda: commit_of(REPO), lambda: fetch(REPO, "0" * 40, ["*.json"])):
        with pytest.raises(NestedAttentionError, match=f"{REPO} asks for consent first; open its page on the Hub, accept"):
            ask()


@pytest.mark.parametrize("revision", ["1" * 40, "v1"])
def test_a_revision_that_is_gone_is_named(revision: str, hub: HubServer) -> None:
    hub.publish(REPO, {"config.json": b"{}"})
    record_file().parent.mkdir(parents=True)
    record_file().write_text(json.dumps({REPO: revision}))
    with pytest.raises(NestedAttentionError, match=f"{REPO} has no revision {revision} any more; .*{record_file().name}"):
        fetch(REPO, None, ["*.json"])


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_repo_that_moves_on_is_used_at_its_recorded_commit(revision: str | None, hub: HubServer) -> None:
    first = hub.publish(REPO, {"config.json": b"1", "more.json": b"1"})
    assert (fetch(REPO, revision, ["config.json"]) / "config.json").read_bytes() == b"1"
    second = hub.publish(REPO, {"config.json": b"2", "more.json": b"2"})
    assert (fetch(REPO, revision, ["*.json"]) / "more.json").read_bytes() == b"1"
    assert commit_of(REPO, revision) == commit_of(REPO, revision, local=True) == first
    assert (fetch(REPO, second, ["*.json"]) / "more.json").read_bytes() == b"2"
    record_file().unlink()
    assert commit_of(REPO, revision) == second


@pytest.mark.parametrize("revision", [None, "main"])
def test_without_a_hub_what_others_fetched_is_used(revision: str | None, hub: HubServer, monkeypatch, tmp_path: Path) -> None:
    commit = hub.publish(REPO, {"config.json": b"1"})
    snapshot_download(REPO)
    hub.publish(REPO, {"config.json": b"2"})
    assert commit_of(REPO, revision, local=True) == commit and not record_file().exists()
    hub.fail_once("GET /api/models", 500)
    with pytest.raises(NestedAttentionError, match="refused"):
        commit_of(REPO, revision)
    with HubServer("token") as gone:
        visit(gone, monkeypatch, tmp_path / "home")
    assert (fetch(REPO, revision, ["*.json"]) / "config.json").read_bytes() == b"1"
    assert commit_of(REPO, revision) == commit and record_file().exists()
    with pytest.raises(NestedAttentionError, match="somebody/else is not in the cache and the Hub cannot be reached"):
        commit_of("somebody/else", revision)


def test_a_download_that_finds_no_room_is_said(hub: HubServer) -> None:
    hub.publish(REPO, {"model.safetensors": bytes(100_000)})
    commit = commit_of(REPO)
    with no_file_beyond(50_000), pytest.raises(NestedAttentionError, match=f"no room: {REPO} does not fit into .*home; free some, or set"):
        fetch(REPO, commit, ["*"])
    assert [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file() and path.stat().st_size > 10_000] == []
    assert (fetch(REPO, commit, ["*"]) / "model.safetensors").stat().st_size == 100_000


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Data processing error: I/O error: No space left on device (os error 28)", "no room: .* does not fit into .*; free some, or set"),
        ("Task error: File reconstruction error", r"cannot be fetched \(Task error: .*\); try again, .* or copy its folder here"),
    ],
)
def test_what_the_storage_of_large_files_raises_is_said(said: str, words: str) -> None:
    with pytest.raises(NestedAttentionError, match=words), spoken_errors(REPO):
        raise RuntimeError(said)


def test_a_commit_that_is_recorded_meanwhile_stays(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {repo: hub.publish(repo, {"config.json": b"{}"}) for repo in (REPO, "somebody/else")}
    answer = hub.answer

    def in_the_meantime(method: str, address: str, token: str | None, body: bytes) -> Answer:
        if address.startswith(f"/api/models/{REPO}"):
            commit_of("somebody/else")
        return answer(method, address, token, body)

    monkeypatch.setattr(hub, "answer", in_the_meantime)
    commit_of(REPO)
    assert recorded_commits() == commits


@pytest.mark.parametrize("text", ["{", "7"])
def test_a_damaged_record_is_named(text: str, hub: HubServer) -> None:
    record_file().parent.mkdir(parents=True)
    record_file().write_text(text)
    with pytest.raises(NestedAttentionError, match=r"revisions\.json, which only records .* is damaged; delete it"):
        commit_of(REPO)


def test_what_came_from_the_hub_is_deleted_to_get_it_back(hub: HubServer) -> None:
    hub.publish(REPO, {"model_index.json": b"{"})
    with pytest.raises(NestedAttentionError, match="damaged"):
        load_base(REPO, torch.float32)
    folder = Path(constants.HF_HUB_CACHE) / "models--somebody--something"
    assert get_back(folder / "snapshots/1/unet/model.safetensors") == f"delete {folder} and start again, so that it is downloaded anew"
    made = record_file().parent / "released"
    assert get_back(made / "config.json").startswith(f"delete {made} and start again")


def test_only_what_is_shipped_comes_back_from_git(tmp_path: Path) -> None:
    for shipped in ("assets/storybook/base", ASSETS / "storybook/adapters/cat/config.json"):
        assert get_back(shipped) == f"get it back with `git checkout -- {shipped}`"
    for own in (tmp_path / "base", "runs/adapter-cat/adapter", "assets"):
        assert get_back(own) == "put back a whole copy, or download or make it again"
