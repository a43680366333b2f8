"""`train.adapter` on photos: stages, what a job lacks, what it starts from."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

import train.adapter
from nested_attention import NestedAttentionError, bases, encoding
from nested_attention.adapters import Adapter, read_config
from nested_attention.encoder import CLIP_VIT_H, ImageConfig
from tests import photo_run, tiny
from tests.photo_files import PLACES, prepared
from train.adapter import CONFIGS, Job, default_config
from train.loop import LoopConfig, check
from train.push import Run, card
from train.settings import read_section


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared(tmp_path_factory.mktemp("photos") / "prepared", [f"<person> {PLACES[number % 3]}" for number in range(30)])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny SDXL in `base` and the tiny image encoder in `vision`."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.stock("sdxl").save_pretrained(folder / "base")
    tiny.vision().save_pretrained(folder / "vision")
    return folder


@pytest.fixture
def job(parts: Path, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Two stages of two steps on photos; its pictures are small and drawn in one step."""
    monkeypatch.setitem(bases.ARCHITECTURES, "StableDiffusionXLPipeline", photo_run.SMALL)
    loop = {"steps": 2, "batch_size": 2, "muon_lr": 0.0, "mixed_precision": "no", "workers": 0, "log_every": 1, "held_out_every": 5}
    config = {
        "image_encoder": str(parts / "vision"), "framing": "face", "value_norm": "full", "lam": 1.0, "licence": "MIT",
        "image": {"size": 32}, "qformer": {"num_tokens": 4, "width": 32, "depth": 1, "heads": 2, "head_dim": 16},
        "stages": [{"resolution": 64, "loop": loop}, {"resolution": 128, "loop": loop | {"steps": 1, "tensorboard": True}}],
    }  # fmt: skip
    return Job("person", "man", str(parts / "base"), photos, None, tmp_path / "features", tmp_path / "run", config)


def test_stages_follow_each_other_draw_grids_and_become_a_card(job: Job) -> None:
    folder = job.run()
    adapter = Adapter.load(folder, tiny.stock("sdxl").unet)
    assert adapter.config.word == "man" and adapter.config.framing == "face" and adapter.config.image_revision is None
    last, first = job.out, job.out / "stage-1"
    assert [json.loads((run / "progress.json").read_text())["step"] for run in (first / "state", last / "state")] == [2, 1]
    for run, steps in ((first, 2), (last, 1)):
        assert Image.open(run / f"grids/{steps:06d}.png").size == (4 * 32, 32)  # one photo is held out: itself, three prompts
    assert list(last.glob("**/events.out.tfevents*")) and not list(first.glob("**/events.out.tfevents*"))
    run = Run.read(job.out)
    assert [stage.steps for stage in run.stages] == [2, 1] and run.grids == {2: first / "grids/000002.png", 3: last / "grids/000001.png"}
    made = json.loads((first / "config.json").read_text())
    assert (made["photos"], made["start"], made["settings"]["value_norm"]) == (30, None, "full") and "stages" not in made["settings"]
    logged = json.loads((last / "log.jsonl").read_text())
    assert adapter.config.metrics == {"last loss": logged["loss"], "held-out loss": logged["held_out"]}
    text = card(run, "me/man")
    for row in (
        "| photos | 30 |",
        "| processes | 1 |",
        "| steps | 3 (2 + 1) |",
        f"| last loss | {logged['loss']:g} |",
        f"| held-out loss | {logged['held_out']:g} |",
    ):
        assert row in text


def test_frozen_parts_in_16_bit_train_and_draw_without_autocast(job: Job) -> None:
    half = replace(job, config=job.config | {"frozen": "bfloat16", "stages": job.config["stages"][:1]}, cache=None)
    half.run()
    assert (job.out / "grids/000002.png").is_file()


def test_an_image_encoder_on_the_hub_is_kept_at_its_commit(job: Job, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.adapter, "commit_of", lambda repo: f"commit of {repo}")
    monkeypatch.setattr(encoding, "fetch", lambda repo, revision, patterns: parts)
    model, _ = replace(job, config=job.config | {"image_encoder": "me/eyes", "image_subfolder": "vision"}).model()
    config = model.adapter.config
    assert (config.image_encoder, config.image_subfolder, config.image_revision) == ("me/eyes", "vision", "commit of me/eyes")


def test_what_a_job_lacks_is_said_before_the_base_is_loaded(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.adapter, "load_base", None)
    first = job.config["stages"][0]
    storybook = job.config | {"stages": [{"loop": first["loop"]}], "diffusion": {}}
    for wrong, words in (
        (replace(job, data="/nowhere/at/all"), "there is nothing to train on"),
        (replace(job, kind="cat"), r"names <person>: .* or train with --kind person\."),
        (replace(job, data=None), r"this config is for photos, .*; name them with --data\."),
        (replace(job, config=storybook), "this config is for Storybook's own pictures"),
        (replace(job, config=storybook, data=None, kind="dog"), "Storybook has no 'dog'"),
        (later(job, resolution=100), "the resolution 100 is not a multiple of 64"),
        (later(job, loop=first["loop"] | {"batch_size": 3, "accumulation": 2}), "a batch of 3 cannot be divided into 2 equal parts"),
        (
            later(job, loop=first["loop"] | {"acumulation": 2}),
            r"unexpected keyword argument 'acumulation'\); correct it, its settings are steps, ",
        ),
        (
            later(job, loop=first["loop"] | {"mixed_precision": "bf16"}),
            "more than one mixed_precision, 'bf16' and 'no', .* give all of them the",
        ),
    ):
        with pytest.raises(NestedAttentionError, match=words):
            wrong.run()


def later(job: Job, **changes) -> Job:
    """With another last stage."""
    first, last = job.config["stages"]
    return replace(job, config=job.config | {"stages": [first, last | changes]})


def test_an_adapter_of_other_sizes_is_no_start(job: Job, tmp_path: Path) -> None:
    tiny.adapter(tiny.stock("sdxl").unet, "person", value_norm="full", framing="face").save(tmp_path / "six")
    tiny.vision().save_pretrained(tmp_path / "six/vision")
    with pytest.raises(NestedAttentionError, match=r"six/adapter\.safetensors has other sizes than the config and the base"):
        replace(job, init=tmp_path / "six").model()
    with pytest.raises(NestedAttentionError, match=r"none/adapter\.safetensors is not there, .*train\.keys --kind person\), or .* --init"):
        replace(job, init=tmp_path / "none").model()


@pytest.mark.parametrize(("licence", "kept"), [("CC-BY-NC-SA-4.0", "CC-BY-NC-SA-4.0"), ("MIT", "CC-BY-4.0")])
def test_an_adapter_goes_on_with_the_lambda_and_under_the_licence_of_its_start(job: Job, tmp_path: Path, licence: str, kept: str) -> None:
    start = job.model()[0].adapter
    start.config = replace(start.config, lam=2.0, licence=licence)
    start.save(tmp_path / "start")
    model, _ = replace(job, init=tmp_path / "start", config=job.config | {"licence": "CC-BY-4.0"}).model()
    assert model.adapter.config == replace(start.config, licence=kept)


def test_an_adapter_goes_on_with_the_image_encoder_of_its_start(job: Job, parts: Path, tmp_path: Path) -> None:
    """The config names another one; the start names a folder beside its own, and whose weights it was made of."""
    start = job.model()[0].adapter
    start.config = replace(start.config, image_encoder="../eyes", credit="the weights of Ann")
    start.save(tmp_path / "start")
    for elsewhere in (parts / "vision", tmp_path / "none"):
        tiny.vision().save_pretrained(tmp_path / "eyes")
        model, _ = replace(job, init=tmp_path / "start", config=job.config | {"image_encoder": str(elsewhere)}).model()
        assert (model.adapter.config.image_encoder, model.adapter.config.credit) == (str(tmp_path / "eyes"), "the weights of Ann")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value_norm": "none"}, r"start has learned with value_norm 'none', and this run would go on with 'full'; write the former into"),
        ({"framing": "whole"}, "learned with framing 'whole', and this run would go on with 'face'"),
        ({"image": ImageConfig(32, layer=-2)}, r"learned with image\.layer -2, and this run would go on with -1"),
    ],
)
def test_an_adapter_that_has_learned_with_other_settings_is_no_start(job: Job, tmp_path: Path, changes: dict, words: str) -> None:
    start = job.model()[0].adapter
    start.config = replace(start.config, **changes)
    start.save(tmp_path / "start")
    with pytest.raises(NestedAttentionError, match=words):
        replace(job, init=tmp_path / "start").model()


@pytest.mark.parametrize("kind", ["person", "cat", "vehicle"])
def test_the_shipped_adapters_are_starts_for_the_shipped_config(kind: str, tmp_path: Path) -> None:
    start = bases.ASSETS / "storybook/adapters" / kind
    config = read_section(default_config("storybook"), "adapter")
    model, _ = Job(kind, kind, "storybook", None, start, None, tmp_path / "run", config).model()
    assert replace(model.adapter.config, metrics={}) == replace(read_config(start), metrics={})


def test_the_config_for_few_photos_differs_in_its_loops_only_and_the_released_adapter_fits_it() -> None:
    few, paper = (read_section(CONFIGS / name, "adapter") for name in ("sdxl-few.toml", "sdxl.toml"))
    for one, other in zip(few["stages"], paper["stages"], strict=True):
        assert one["loop"].keys() == other["loop"].keys() and one["resolution"] == other["resolution"]
    assert few | {"stages": []} == paper | {"stages": []}
    assert (few["value_norm"], few["framing"], ImageConfig.from_dict(few["image"])) == (
        "full",
        "face",
        CLIP_VIT_H,
    )  # see `released.convert`


def test_a_run_that_is_far_too_long_for_its_photos_is_told_another_config(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = prepared(tmp_path / "fewer", [f"<person> {PLACES[0]}"] * 9)
    for data, name, said in (
        (job.data, "sdxl-few.toml", ""),
        (fewer, "sdxl-few.toml", "each of the 9 photos 2222 times; lower its steps."),
        (job.data, "sdxl.toml", "each of the 30 photos 170666 times; for few photos and one GPU there is --config"),
    ):
        replace(job, data=data, config=read_section(CONFIGS / name, "adapter")).photos()
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)


BARE = """
import sys
for name in ("resvg_py", "dicebear_styles", "robohash", "datasets", "skimage"):
    sys.modules[name] = None
import train.adapter, train.prepare, train.push, train.photos.task, train.photos.sources
print([name for name in sys.modules if name.startswith("train.storybook")])
train.adapter.storybook_kinds()
"""


def test_training_on_photos_needs_none_of_the_packages_that_storybook_is_drawn_with() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert done.stdout == "[]\n"
    said = "drawn with packages of which resvg_py is missing; `pip install -r requirements-dev.txt`, or name photos with --data."
    assert done.stderr.rstrip().endswith(said)


def test_every_base_of_sdxls_architecture_has_a_config(parts: Path) -> None:
    found = {base: default_config(base).name for base in ("storybook", "sdxl", "sdxl-lightning", str(parts / "base"), "you/your-sdxl")}
    assert found == dict.fromkeys(found, "sdxl.toml") | {"storybook": "storybook.toml"}
    with pytest.raises(NestedAttentionError, match=r"there is no config for the base sd15; write one after .*sdxl\.toml"):
        default_config("sd15")
    with pytest.raises(NestedAttentionError, match=r"is no config with a section \[adapter\]"):
        read_section(parts / "none.toml", "adapter")
    assert all("resolution" in stage for stage in read_section(default_config("sdxl"), "adapter")["stages"])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "multinode"])
def test_accelerate_reads_the_launch_configs(name: str) -> None:
    path = train.adapter.CONFIGS / f"accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0 and (config.num_machines > 1) == (name == "multinode")


@pytest.mark.parametrize(
    ("name", "launches"), [("storybook", ("ddp", "fsdp", "multinode")), ("sdxl", ("ddp", "fsdp", "multinode")), ("sdxl-few", ())]
)
def test_every_stage_of_the_shipped_configs_runs_on_one_process_and_by_the_launch_configs(name: str, launches: tuple[str, ...]) -> None:
    """The one for few photos is for one GPU."""
    loops = [LoopConfig.from_dict(stage["loop"]) for stage in read_section(CONFIGS / f"{name}.toml", "adapter")["stages"]]
    launched = [load_config_from_file(str(CONFIGS / f"accelerate/{launch}.yaml")) for launch in launches]
    processes = [(1, False), *((config.num_processes, str(config.distributed_type) == "FSDP") for config in launched)]
    for loop in loops:
        for count, sharded in processes:
            check(loop, count, sharded)
