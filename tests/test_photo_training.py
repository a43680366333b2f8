"""Training on photos with the tiny SDXL: exact resume, several processes as one, cached features, few photos."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from safetensors.torch import load_file
from torch.utils import checkpoint

from nested_attention import NestedAttentionError
from tests import photo_run, tiny
from tests.photo_files import PLACES, prepared, served
from train.loop import Share, fit
from train.objective import NoiseObjective, objective_of
from train.photos.cache import MADE_OF, FeatureCache
from train.photos.places import BLOCK


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared(tmp_path_factory.mktemp("photos") / "prepared", [f"<person> {PLACES[number % 3]}" for number in range(30)])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "state/model.safetensors")


def difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all("adapter." in name for name in first)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def whole(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(photo_run.task(photos), photo_run.loop(6, accumulation=2), out, {})
    return out


def test_a_run_in_two_parts_is_the_whole_run_to_the_bit(photos: str, tmp_path: Path) -> None:
    fit(photo_run.task(photos), photo_run.loop(20), tmp_path / "whole", {})
    for steps in (10, 20):
        fit(photo_run.task(photos), photo_run.loop(steps), tmp_path / "parts", {})
    lines = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "parts")]
    whole, parts = ([(line["step"], line["loss"]) for line in run] for run in lines)
    assert whole == parts and len(whole) == 20
    for part in ("model", "average", "optimizer"):
        one, other = (load_file(tmp_path / run / f"state/{part}.safetensors") for run in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("config", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(photos: str, whole: Path, tmp_path: Path, config: str) -> None:
    """With ddp from a shard on a server, which only one of the processes reads through."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"train/configs/accelerate/{config}.yaml",
              "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", "-m", "tests.photo_run"]  # fmt: skip
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "home")}
    with served(Path(photos) / "shards") as (address, handler):
        data = f"{address}/data-000000.tar" if config == "ddp" else photos
        done = subprocess.run([*launch, data, str(tmp_path / "two"), "3", "6"], capture_output=True, text=True, env=env)
    assert handler.asked.count(("/data-000000.tar", f"bytes=0-{BLOCK - 1}")) == (config == "ddp")
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads((tmp_path / "two/config.json").read_text())
    assert (made["processes"], made["sharded"]) == (2, config == "fsdp")
    assert difference(whole, tmp_path / "two") < 1e-5
    logs = [list(map(json.loads, (run / "log.jsonl").read_text().splitlines())) for run in (whole, tmp_path / "two")]
    held_out = [[line["held_out"] for line in log if line["step"] % 2 == 0] for log in logs]
    assert len(held_out[0]) == 3 and held_out[0] == pytest.approx(held_out[1], abs=1e-4)
    assert "held_out" in logs[1][2] and "held_out" not in logs[0][2]  # the two stopped there
    grids = [np.asarray(Image.open(run / "grids/000006.png")).astype(int) for run in (whole, tmp_path / "two")]
    assert abs(grids[0] - grids[1]).max() <= 2


def test_every_part_of_a_batch_has_a_bucket_of_its_own(photos: str) -> None:
    """So that several shapes meet in one update."""
    made, config = photo_run.task(photos), photo_run.loop(20, accumulation=2)
    made.resolution = 256  # at 64 all photos are square
    parts = list(islice(made.batches(config, Share()), 40))
    buckets = [{made.trained.bucket_numbers[made.trained.order[sample]] for sample in part} for part in parts]
    assert all(len(part) == 2 and len(bucket) == 1 for part, bucket in zip(parts, buckets, strict=True))
    assert any(one != other for one, other in zip(buckets[::2], buckets[1::2], strict=True))
    assert list(islice(made.batches(config, Share(step=7)), 26)) == parts[14:]


def test_cached_features_are_those_of_their_photo_but_for_rounding(photos: str, tmp_path: Path) -> None:
    plain, cached = photo_run.task(photos), photo_run.task(photos, FeatureCache(tmp_path / "features"))
    cached.cache_features(Share())
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == len(cached.parts[0]) == 29
    for index in (0, 3, 17, 40):  # the last one in the second epoch
        batches = [{key: value[None] for key, value in task.dataset(0)[index].items()} for task in (plain, cached)]
        assert "reference" not in batches[1] and "input_ids" not in batches[1]
        for name, value in plain.model.conditions(batches[0]).items():
            torch.testing.assert_close(batches[1][name], value.half())
        with torch.no_grad():
            losses = [float(task.loss(task.model, batch)[0]) for task, batch in zip((plain, cached), batches, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_features_of_something_else_and_damaged_ones_are_refused(photos: str, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features")
    made = photo_run.task(photos, cache)
    cache.claim(made.made_of())
    cache.save(3, {"features": torch.zeros(2)})
    cache.claim(photo_run.task(photos).made_of())  # the same again
    config = made.model.adapter.config
    for change in ({"word": "man"}, {"image_encoder": "other", "word": "man"}):
        made.model.adapter.config = replace(config, **change)
        with pytest.raises(NestedAttentionError, match=r"made of another word.*; name a new folder with --cache"):
            cache.claim(made.made_of())
    others = photo_run.task(prepared(tmp_path / "others", ["<person> at night"] * 3))
    with pytest.raises(NestedAttentionError, match="made of another data;"):
        cache.claim(others.made_of())
    (cache.folder / MADE_OF).unlink()
    with pytest.raises(NestedAttentionError, match="made of another data and another kind and"):
        cache.claim(others.made_of())
    cache.file(3).write_bytes(cache.file(3).read_bytes()[:20])
    for number in (3, 4):
        with pytest.raises(NestedAttentionError, match=f"features/{number}.safetensors cannot be read .*; remove that file"):
            cache.load(number)


def test_held_out_photos_are_not_trained_on(photos: str) -> None:
    trained, held = photo_run.task(photos).parts
    assert len(trained) + len(held) == 30 and not set(trained.numbers) & set(held.numbers) and held.numbers == [25]


@pytest.mark.parametrize("count", [1, 5])
def test_few_photos_are_enough(tmp_path: Path, count: int) -> None:
    made = photo_run.task(prepared(tmp_path / "few", [f"<person> {PLACES[0]}"] * count))
    assert [len(part) for part in made.parts] == [max(1, count - 1), min(1, count - 1)] and len(made.references()) == 1
    fit(made, replace(photo_run.loop(1), batch_size=1, held_out_every=1), tmp_path / "run", {})
    (line,) = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert ("held_out" in line) == (count > 1)


def test_captions_that_name_the_subject_too_late_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = "red " * 90 + "<person>"
    made = photo_run.task(prepared(tmp_path / "some", ["<person> at night", late, late, "a drawing of <person>"]))
    assert [part.numbers for part in made.parts] == [[0], [3]]
    said = capsys.readouterr().out
    assert "2 of 4 photos are left out" in said and 'behind the 46 words that the text encoder reads, first "red red' in said
    with pytest.raises(NestedAttentionError, match=r"2 of 2 photos are left out.*; name it earlier\."):
        _ = photo_run.task(prepared(tmp_path / "all", [late, late])).parts


def test_gradient_checkpoints_give_the_same_gradients(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, calls, own = [], [], checkpoint.checkpoint
    monkeypatch.setattr(checkpoint, "checkpoint", lambda *args, **settings: calls.append(args[0]) or own(*args, **settings))
    for checkpointing in (False, True):
        made = photo_run.task(photos)
        unet = made.pipe.stock.unet
        if checkpointing:
            unet.enable_gradient_checkpointing()
        batch = {key: value[None] for key, value in made.dataset(0)[0].items()}
        made.loss(made.model, batch)[0].backward()
        gradients.append([parameter.grad for parameter in made.model.parameters() if parameter.requires_grad])
        blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
        assert not unet.training and (len(calls) >= len(blocks) if checkpointing else not calls)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_noise_objective_is_the_schedulers(photos: str) -> None:
    scheduler = tiny.stock("sdxl").scheduler
    objective = objective_of(scheduler)
    assert isinstance(objective, NoiseObjective)
    clean, noise, level = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.5, 0.999])
    steps = objective.timesteps(level)
    torch.testing.assert_close(objective.noisy(clean, noise, level), scheduler.add_noise(clean, noise, steps))
    assert float(objective.error(noise, clean, noise, level).max()) == 0
    velocity = NoiseObjective(scheduler.alphas_cumprod, "v_prediction")
    assert float(velocity.error(scheduler.get_velocity(clean, noise, steps), clean, noise, level).max()) < 1e-10


def test_a_photo_that_a_worker_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    folder = Path(prepared(tmp_path / "some", ["<person> at night"] * 4))
    damaged = folder / "images/0.png"
    damaged.write_bytes(damaged.read_bytes()[:4000])
    said = f"images/0.png in {folder} is damaged or cut off and cannot be read; save it again as PNG or JPEG. "
    said += f"To go on without it, remove its line from {folder / 'metadata.jsonl'} and give the same command."
    with pytest.raises(NestedAttentionError) as caught:
        fit(photo_run.task(str(folder)), replace(photo_run.loop(2), batch_size=1, workers=1), tmp_path / "run", {})
    assert str(caught.value) == said
