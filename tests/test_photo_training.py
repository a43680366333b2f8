"""Training on photos with the tiny SDXL: exact resume, several processes as one, cached features, gradient checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import photo_run, tiny
from train.loop import Share, fit
from train.objective import NoiseObjective, objective_of

PLACES = ("on the beach", "in the snow", "at night")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared folder of thirty small photos of noise, of three shapes."""
    folder = tmp_path_factory.mktemp("photos") / "prepared"
    (folder / "images").mkdir(parents=True)
    (folder / "references").mkdir()
    lines = []
    for number in range(30):
        size = ((80, 80), (64, 96), (96, 64))[number % 3]
        tiny.photo(number, size).save(folder / f"images/{number}.png")
        tiny.photo(100 + number, (40, 40)).save(folder / f"references/{number}.png")
        line = {"file_name": f"images/{number}.png", "reference": f"references/{number}.png", "text": f"<person> {PLACES[number % 3]}"}
        lines.append(json.dumps(line | {"height": size[0], "width": size[1], "method": "whole"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "state/model.safetensors")


def difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all("adapter." in name for name in first)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def whole(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(photo_run.task(photos), photo_run.loop(6), out, {})
    return out


def test_a_run_in_two_parts_is_the_whole_run_to_the_bit(photos: str, whole: Path, tmp_path: Path) -> None:
    fit(photo_run.task(photos), photo_run.loop(3), tmp_path / "parts", {})
    (tmp_path / "parts/log.jsonl").unlink()
    fit(photo_run.task(photos), photo_run.loop(6), tmp_path / "parts", {})
    assert [json.loads(line)["step"] for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()] == [4, 5, 6]
    assert difference(whole, tmp_path / "parts") == 0


@pytest.mark.parametrize("how", ["each a copy", "shard"])
def test_two_processes_do_what_one_does(photos: str, whole: Path, tmp_path: Path, how: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0", "-m", "tests.photo_run"]  # fmt: skip
    shard = ["shard"] if how == "shard" else []
    for steps in ("3", "6") if shard else ("6",):  # sharded: stopped and resumed
        command = [*launch, photos, str(tmp_path / "two"), steps, "1", *shard]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert difference(whole, tmp_path / "two") < 1e-5
    held_out = [
        [json.loads(line).get("held_out") for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, tmp_path / "two")
    ]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-4)


def test_accumulated_batches_differ_only_in_their_buckets(photos: str, tmp_path: Path) -> None:
    """Every part of a batch has one bucket of its own, so that many shapes meet in one update."""
    fit(photo_run.task(photos), photo_run.loop(2, accumulation=2), tmp_path / "run", {})
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_cached_features_change_nothing_but_rounding(photos: str, tmp_path: Path) -> None:
    plain, cached = photo_run.task(photos), photo_run.task(photos, tmp_path / "features")
    cached.cache_features(Share())
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == len(cached.parts[0])
    batches = [{key: value[None] for key, value in task.dataset(0)[3].items()} for task in (plain, cached)]
    assert "features" in batches[1] and "reference" not in batches[1]
    with torch.no_grad():
        losses = [float(task.loss(task.model, batch)[0]) for task, batch in zip((plain, cached), batches, strict=True)]
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]


def test_held_out_photos_are_not_trained_on(photos: str) -> None:
    trained, held = photo_run.task(photos).parts
    assert len(trained) + len(held) == 30 and not set(trained.numbers) & set(held.numbers) and len(held) == 1


def test_gradient_checkpoints_give_the_same_gradients(photos: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        made = photo_run.task(photos)
        if checkpointing:
            made.pipe.stock.unet.enable_gradient_checkpointing()
            made.pipe.stock.unet.train()
        batch = {key: value[None] for key, value in made.dataset(0)[0].items()}
        made.loss(made.model, batch)[0].backward()
        gradients.append([parameter.grad for parameter in made.model.parameters() if parameter.requires_grad])
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
