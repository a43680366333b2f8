"""The one training loop: every command gives it a `Task`.

A run is a folder: `config.json`, `log.jsonl` (one line a tick), `state/` (the last checkpoint) and `grids/`.
The same command resumes it. Sample `n` of the run is a function of `n`, so a run that was stopped goes on exactly, and
several processes (`accelerate launch`) take the samples of a batch in turn and together do what one would.
"""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from nested_attention.files import replaced
from train.optim import build_optimizers

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run.

    `batch_size` is what one update sees, over all processes and over `accumulation` passes, both of which divide it.
    Rates rise linearly over `warmup` steps, stay, and fall linearly to zero over the last `cooldown` of all steps.
    `muon_lr` 0 leaves everything to AdamW.
    """

    steps: int
    batch_size: int
    lr: float = 6e-4
    muon_lr: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.2
    ema: float = 0.998
    clip: float = 1.0
    accumulation: int = 1
    mixed_precision: str = "bf16"
    compile: bool = False
    workers: int = 1
    log_every: int = 10
    save_minutes: float = 6.0
    grid_every: int = 200
    held_out_every: int = 0
    tensorboard: bool = False
    not_muon: tuple[str, ...] = ()

    def rate(self, step: int) -> float:
        """Factor of the learning rates at `step`."""
        rest = (self.steps - step) / max(1, round(self.steps * self.cooldown))
        return min(1.0, (step + 1) / max(1, self.warmup), rest)


@dataclass(frozen=True)
class Share:
    """Which part of a run's batches a process works on, and from which step on."""

    step: int = 0
    rank: int = 0
    processes: int = 1


class Task(ABC):
    """What a training command provides: what learns, from which samples, by which loss."""

    model: nn.Module

    @abstractmethod
    def dataset(self, length: int) -> Dataset:
        """At least `length` samples."""

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, a mean over its samples, and numbers for the log."""

    def batches(self, config: LoopConfig, share: Share) -> Iterator[list[int]]:
        """Indices into the dataset for every batch of this process; all batches of a step come one after the other."""
        for step in range(share.step, config.steps):
            mine = range(step * config.batch_size + share.rank, (step + 1) * config.batch_size, share.processes)
            size = len(mine) // config.accumulation
            yield from (list(mine[k * size : (k + 1) * size]) for k in range(config.accumulation))

    def held_out(self) -> Iterable[Batch]:
        """Batches with fixed noise that are never trained on, to compare states of a run by their loss."""
        return ()

    def grid(self, model: nn.Module, path: Path) -> None:
        """Draws what the averaged `model` makes of fixed prompts and seeds, where there is something to draw."""
        return None


class Checkpoint:
    """Weights, average and optimizer state of a run as safetensors, replaced as a whole."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
        with replaced(self.folder) as fresh:
            fresh.mkdir()
            for name, content in tensors.items():
                save_file({key: value.detach().contiguous().clone() for key, value in content.items()}, fresh / f"{name}.safetensors")
            (fresh / "progress.json").write_text(json.dumps({"step": step, **progress}))

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

    Raises:
        ValueError: processes and accumulation do not divide the batch.
        FloatingPointError: the loss is no longer finite.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with="tensorboard" if config.tensorboard else None, project_dir=folder
    )
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise ValueError(f"a batch of {config.batch_size} cannot be divided into {parts} equal parts; change batch_size or accumulation.")
    model = task.model.to(accelerator.device)
    optimizers = build_optimizers(model, config.lr, config.muon_lr, config.not_muon)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    frozen = {id(tensor): tensor for tensor in model.parameters() if not tensor.requires_grad}
    average = deepcopy(model, frozen).eval().requires_grad_(False)  # what is frozen is shared: a large base exists once
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
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"loop": asdict(config), **description}, indent=2))
    accelerator.init_trackers("")

    def save() -> None:
        tensors = {
            "model": trainable(model), "average": {name: averaged[name].data for name in current},
            "optimizer": optimizer_tensors(model, optimizers),
        }  # fmt: skip
        checkpoint.save(step, tensors, {"seconds": round(seconds)})

    batches = iterate(task, config, Share(step, accelerator.process_index, accelerator.num_processes))
    saved = tick = time.monotonic()
    sums: dict[str, float] = {}
    while step < config.steps:
        for part in range(config.accumulation):
            batch = {key: value.to(accelerator.device) for key, value in next(batches).items()}
            last = part == config.accumulation - 1
            with training_attention(accelerator.device), nullcontext() if last else accelerator.no_sync(prepared):
                with accelerator.autocast():
                    loss, logs = task.loss(forward, batch)
                accelerator.backward(loss / config.accumulation)
            for key, value in {"loss": float(loss.detach()), **logs}.items():
                sums[key] = sums.get(key, 0.0) + value / config.accumulation
        sums["norm"] = sums.get("norm", 0.0) + float(accelerator.clip_grad_norm_(current_parameters(model), config.clip))
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * config.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_([averaged[name].data for name in current], list(current.values()), 1 - decay)
        line: dict[str, float] = {}
        if step % config.log_every == 0:
            means = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device) / config.log_every, "mean")
            now = time.monotonic()
            seconds += now - tick
            line = {key: round(value, 5) for key, value in zip(sums, means.tolist(), strict=True)}
            line |= {"rate": round(config.rate(step), 4), "samples_per_s": round(config.log_every * config.batch_size / (now - tick), 2)}
            line |= {"hours": round(seconds / 3600, 3)}
            sums, tick = {}, now
        if config.held_out_every and step % config.held_out_every == 0:
            with accelerator.autocast():
                line["held_out"] = held_out_loss(task, average, accelerator.device)
        if accelerator.is_main_process:
            if line:
                with open(folder / "log.jsonl", "a") as log:
                    log.write(json.dumps({"step": step, **line}) + "\n")
                accelerator.log(line, step)
            if step % config.grid_every == 0 or step == config.steps:
                (folder / "grids").mkdir(exist_ok=True)
                with accelerator.autocast():
                    task.grid(average, folder / "grids" / f"{step:06d}.png")
            if time.monotonic() - saved > 60 * config.save_minutes or step == config.steps:
                save()
                saved = time.monotonic()
        if not math.isfinite(line.get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {line['loss']} at step {step}; lower lr or muon_lr and start from the last checkpoint")
    accelerator.end_training()
    return average


def training_attention(device: torch.device) -> AbstractContextManager:
    """The kernels that train fastest: on a CPU the backward pass of flash attention is slow."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def current_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def iterate(task: Task, config: LoopConfig, share: Share) -> Iterator[Batch]:
    """The batches of a process: sample `n` of the run is item `n` of the dataset."""
    loader: DataLoader = DataLoader(
        task.dataset(config.steps * config.batch_size), batch_sampler=Order(task, config, share), num_workers=config.workers,
        persistent_workers=config.workers > 0, prefetch_factor=4 if config.workers else None,
    )  # fmt: skip
    return iter(loader)


@dataclass(frozen=True)
class Order:
    """`Task.batches` as a `DataLoader` wants it."""

    task: Task
    config: LoopConfig
    share: Share

    def __iter__(self) -> Iterator[list[int]]:
        return self.task.batches(self.config, self.share)


@torch.no_grad()
def held_out_loss(task: Task, model: nn.Module, device: torch.device) -> float:
    """The mean loss over `task.held_out()`, with the same noise every time."""
    losses = [task.loss(model, {key: value.to(device) for key, value in batch.items()})[0] for batch in task.held_out()]
    return round(float(torch.stack(losses).mean()), 5)
