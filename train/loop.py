"""The one training loop: every command gives it a `Task`.

A run is a folder: `config.json`, `log.jsonl` (one line a tick), `state/` (the last checkpoint) and `grids/`.
The same command resumes it. Sample `n` of the run is a function of `n`, so a run that was stopped goes on exactly.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from train.optim import build_optimizers

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run.

    Rates rise linearly over `warmup` steps, stay, and fall linearly to zero over the last `cooldown` of all steps.
    """

    steps: int
    batch_size: int
    lr: float = 6e-4
    muon_lr: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.2
    ema: float = 0.998
    clip: float = 1.0
    mixed_precision: str = "bf16"
    compile: bool = False
    workers: int = 1
    log_every: int = 10
    save_minutes: float = 6.0
    grid_every: int = 200
    not_muon: tuple[str, ...] = ()

    def rate(self, step: int) -> float:
        """Factor of the learning rates at `step`."""
        rest = (self.steps - step) / max(1, round(self.steps * self.cooldown))
        return min(1.0, (step + 1) / max(1, self.warmup), rest)


class Task(Protocol):
    """What a training command provides."""

    @property
    def model(self) -> nn.Module: ...

    def dataset(self, length: int) -> Dataset: ...

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]: ...

    def grid(self, model: nn.Module, path: Path) -> None: ...


class Checkpoint:
    """Weights, average and optimizer state of a run as safetensors, replaced as a whole."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
        fresh = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, content in tensors.items():
            save_file({key: value.detach().contiguous().clone() for key, value in content.items()}, fresh / f"{name}.safetensors")
        (fresh / "progress.json").write_text(json.dumps({"step": step, **progress}))
        shutil.rmtree(self.folder, ignore_errors=True)
        fresh.rename(self.folder)

    def load(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        if not (self.folder / "progress.json").exists():
            return None
        tensors = {path.stem: load_file(path) for path in self.folder.glob("*.safetensors")}
        return tensors, json.loads((self.folder / "progress.json").read_text())


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of all optimizers as one flat dict, keyed `parameter/quantity`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{quantity}": torch.as_tensor(value)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for quantity, value in state.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer], flat: dict[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` gave."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, quantity = key.split("/")
        states.setdefault(name, {})[quantity] = value
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if names[parameter] in states:
                    optimizer.state[parameter] = {
                        quantity: value.to(parameter.device) if value.ndim else value
                        for quantity, value in states[names[parameter]].items()
                    }


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def fit(task: Task, config: LoopConfig, folder: Path, description: dict[str, Any]) -> nn.Module:
    """Trains `task.model` up to `config.steps` and returns its moving average.

    `description` is written next to the run, so that anyone can see how it was made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"loop": asdict(config), **description}, indent=2))
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    model = task.model.to(accelerator.device)
    optimizers = build_optimizers(model, config.lr, config.muon_lr, config.not_muon)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = deepcopy(model).eval().requires_grad_(False)
    checkpoint = Checkpoint(folder / "state")
    step, seconds = 0, 0.0
    if loaded := checkpoint.load():
        tensors, progress = loaded
        step, seconds = progress["step"], progress["seconds"]
        model.load_state_dict(tensors["model"], strict=False)
        average.load_state_dict(tensors["average"], strict=False)
        load_optimizer_tensors(model, optimizers, tensors["optimizer"])
    averaged, current = dict(average.named_parameters()), trainable(model)
    prepared = accelerator.prepare(model)
    forward = torch.compile(prepared) if config.compile else prepared

    def save() -> None:
        tensors = {
            "model": trainable(model), "average": {name: averaged[name].data for name in current},
            "optimizer": optimizer_tensors(model, optimizers),
        }  # fmt: skip
        checkpoint.save(step, tensors, {"seconds": round(seconds)})

    batches = iterate(task.dataset(config.steps * config.batch_size), config, step)
    saved = tick = time.monotonic()
    sums: dict[str, float] = {}
    while step < config.steps:
        batch = {key: value.to(accelerator.device) for key, value in next(batches).items()}
        loss, logs = task.loss(forward, batch)
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(current_parameters(model), config.clip))
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * config.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_([averaged[name].data for name in current], list(current.values()), 1 - decay)
        for key, value in {"loss": float(loss.detach()), "norm": norm, **logs}.items():
            sums[key] = sums.get(key, 0.0) + value
        if step % config.log_every == 0:
            now = time.monotonic()
            seconds += now - tick
            line = {"step": step, **{key: round(value / config.log_every, 5) for key, value in sums.items()}}
            line |= {"rate": round(config.rate(step), 4), "samples_per_s": round(config.log_every * config.batch_size / (now - tick), 2)}
            line |= {"hours": round(seconds / 3600, 3)}
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            if not math.isfinite(line["loss"]):
                raise FloatingPointError(
                    f"the loss is {line['loss']} at step {step}; lower lr or muon_lr and start from the last checkpoint"
                )
            sums, tick = {}, now
        if step % config.grid_every == 0 or step == config.steps:
            (folder / "grids").mkdir(exist_ok=True)
            task.grid(average, folder / "grids" / f"{step:06d}.png")
        if time.monotonic() - saved > 60 * config.save_minutes or step == config.steps:
            save()
            saved = time.monotonic()
    return average


def current_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def iterate(dataset: Dataset, config: LoopConfig, step: int) -> Iterator[Batch]:
    """Batches from `step` on: sample `n` of the run is item `n` of the dataset."""
    order = range(step * config.batch_size, config.steps * config.batch_size)
    loader: DataLoader = DataLoader(
        dataset, config.batch_size, sampler=order, num_workers=config.workers, drop_last=True,
        persistent_workers=config.workers > 0, prefetch_factor=4 if config.workers else None,
    )  # fmt: skip
    return iter(loader)
