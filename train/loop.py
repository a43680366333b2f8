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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from nested_attention.errors import NestedAttentionError
from nested_attention.loading import computes_bfloat16
from train.optim import build_optimizers
from train.processes import asked_to_shard, shard, synchronize, this_process
from train.state import Average, Checkpoint, learning, load_optimizer_tensors, load_weights, optimizer_tensors, whole

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run.

    `batch_size` is what one update sees, over all processes and over `accumulation` passes, both of which divide it.
    Rates rise linearly over `warmup` steps, stay, and fall linearly to zero over the last `cooldown` of all steps.
    `muon_lr` 0 leaves everything to AdamW; `white_lr` is AdamW's rate where a task gives white coordinates. `behind`: steps
    of earlier runs that this one goes on from with `--init`; its samples begin behind theirs. `mixed_precision`
    is "bf16" or "no"; without it bfloat16 is used where the device computes in it.
    """

    steps: int
    batch_size: int
    behind: int = 0
    lr: float = 6e-4
    muon_lr: float = 2e-3
    white_lr: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.2
    ema: float = 0.998
    clip: float = 1.0
    accumulation: int = 1
    mixed_precision: str | None = None
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
        for step in range(share.step, config.behind + config.steps):
            mine = range(step * config.batch_size + share.rank, (step + 1) * config.batch_size, share.processes)
            size = len(mine) // config.accumulation
            yield from (list(mine[k * size : (k + 1) * size]) for k in range(config.accumulation))

    def held_out(self) -> Iterable[Batch]:
        """Batches with fixed noise that are never trained on, to compare states of a run by their loss."""
        return ()

    def grid(self) -> Image.Image | None:
        """What the model makes of fixed prompts and seeds, where there is something to draw."""
        return None

    def white(self) -> dict[str, Tensor]:
        """For weights of linear layers, by name, coordinates in which what they read is white (`train.whitening`)."""
        return {}

    def units(self) -> list[nn.Module]:
        """The parts that a sharded run gathers one at a time, innermost first. What lies in none stays whole."""
        return []


def fit(task: Task, config: LoopConfig, folder: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    """Trains `task.model` up to `config.steps`. Returns the moving average of what learned, by parameter, on the CPU.

    `description` is written next to the run, so that anyone can see how it was made.

    Raises:
        NestedAttentionError: a setting cannot be used, see `check`, or the run's checkpoint cannot.
        FloatingPointError: the loss is no longer finite.
    """
    sharded = asked_to_shard()
    check(config, this_process().num_processes, sharded)
    precision = config.mixed_precision or ("bf16" if computes_bfloat16(this_process().device) else "no")
    accelerator = Accelerator(mixed_precision=precision, log_with="tensorboard" if config.tensorboard else None, project_dir=folder)
    processes, device = accelerator.num_processes, accelerator.device
    model = task.model.to(device)
    if sharded:
        shard(model, task.units(), device, processes)
    optimizers = build_optimizers(model, config.lr, config.muon_lr, config.not_muon, task.white(), config.white_lr)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = Average(model)
    checkpoint = Checkpoint(folder / "state")
    step, seconds = 0, 0.0
    if loaded := checkpoint.load():
        tensors, progress = loaded
        step, seconds = progress["step"], progress["seconds"]
        load_weights(average.current, tensors["model"])
        load_weights(average.tensors, tensors["average"])
        load_optimizer_tensors(model, optimizers, tensors["optimizer"])
    prepared = model if sharded else accelerator.prepare(model)
    forward = torch.compile(prepared) if config.compile else prepared
    if accelerator.is_main_process:
        (folder / "grids").mkdir(parents=True, exist_ok=True)
        made = {"loop": asdict(config), "processes": processes, "sharded": sharded, **description}
        (folder / "config.json").write_text(json.dumps(made, indent=2))
    accelerator.init_trackers("")

    def save() -> None:
        state = {"model": average.current, "average": average.tensors, "optimizer": optimizer_tensors(model, optimizers)}
        gathered = {name: {key: whole(value) for key, value in content.items()} for name, content in state.items()}
        if accelerator.is_main_process:
            checkpoint.save(gathered, {"step": step, "seconds": round(seconds)})

    batches = iterate(task, config, Share(config.behind + step, accelerator.process_index, processes))
    saved = tick = time.monotonic()
    sums: dict[str, float] = {}
    summed = 0  # steps that are in `sums`: after a resume fewer than usual
    while step < config.steps:
        for part in range(config.accumulation):
            batch = {key: value.to(device) for key, value in next(batches).items()}
            last = part == config.accumulation - 1
            synchronize(model, last)
            with training_attention(device), nullcontext() if last or sharded else accelerator.no_sync(prepared):
                with accelerator.autocast():
                    loss, logs = task.loss(forward, batch)
                accelerator.backward(loss / config.accumulation)
            for key, value in {"loss": float(loss.detach()), **logs}.items():
                sums[key] = sums.get(key, 0.0) + value / config.accumulation
        norm = torch.nn.utils.clip_grad_norm_(learning(model).values(), config.clip)
        sums["norm"] = sums.get("norm", 0.0) + float(whole(norm))
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * config.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        summed += 1
        average.update(min(config.ema, (1 + step) / (10 + step)))
        line: dict[str, float] = {}
        if step % config.log_every == 0:
            means = accelerator.reduce(torch.tensor(list(sums.values()), device=device) / summed, "mean")
            now = time.monotonic()
            seconds += now - tick
            line = {key: round(value, 5) for key, value in zip(sums, means.tolist(), strict=True)}
            line |= {"rate": round(config.rate(step), 4), "samples_per_s": round(summed * config.batch_size / (now - tick), 2)}
            line |= {"hours": round(seconds / 3600, 3)}
            sums, summed, tick = {}, 0, now
        if config.held_out_every and step % config.held_out_every == 0:
            with accelerator.autocast(), average.in_place():
                line |= held_out_loss(task, device)
        if line and accelerator.is_main_process:
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step, **line}) + "\n")
            accelerator.log(line, step)
        if (step % config.grid_every == 0 or step == config.steps) and (sharded or accelerator.is_main_process):
            with accelerator.autocast(), average.in_place():
                grid = task.grid()
            if grid is not None and accelerator.is_main_process:
                grid.save(folder / f"grids/{step:06d}.png")
        if agreed(accelerator, time.monotonic() - saved > 60 * config.save_minutes) or step == config.steps:
            save()
            saved = time.monotonic()
        if not math.isfinite(line.get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {line['loss']} at step {step}; lower lr or muon_lr and start from the last checkpoint")
    for tracker in accelerator.trackers:
        tracker.finish()
    return {name: whole(value) for name, value in average.tensors.items()}


def check(config: LoopConfig, processes: int, sharded: bool) -> None:
    """Whether a run with these settings can be.

    Raises:
        NestedAttentionError: it cannot.
    """
    parts = processes * config.accumulation
    if config.batch_size % parts:
        raise NestedAttentionError(
            f"a batch of {config.batch_size} cannot be divided into {parts} equal parts; change batch_size or accumulation."
        )
    if sharded and config.muon_lr:
        raise NestedAttentionError("Muon needs whole matrices, which no process has in a sharded run; set muon_lr to 0.")
    if config.mixed_precision not in (None, "no", "bf16"):
        raise NestedAttentionError(
            f"mixed_precision {config.mixed_precision!r} needs gradients that are scaled, which this loop does not do; use 'bf16' or 'no'."
        )


def agreed(accelerator: Accelerator, wish: bool) -> bool:
    """The main process's wish, on every process: their clocks differ."""
    if accelerator.num_processes == 1:
        return wish
    return bool(broadcast_object_list([wish])[0])


def training_attention(device: torch.device) -> AbstractContextManager:
    """The kernels that train fastest: on a CPU the backward pass of flash attention is slow."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def iterate(task: Task, config: LoopConfig, share: Share) -> Iterator[Batch]:
    """The batches of a process: sample `n` of the run is item `n` of the dataset, counted from its first."""
    loader: DataLoader = DataLoader(
        task.dataset((config.behind + config.steps) * config.batch_size), batch_sampler=Order(task, config, share),
        num_workers=config.workers, persistent_workers=config.workers > 0, prefetch_factor=4 if config.workers else None,
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
def held_out_loss(task: Task, device: torch.device) -> dict[str, float]:
    """For the log: the mean loss over `task.held_out()`, with the same noise every time; nothing if nothing is held out."""
    losses = [task.loss(task.model, {key: value.to(device) for key, value in batch.items()})[0] for batch in task.held_out()]
    return {"held_out": round(float(torch.stack(losses).mean()), 5)} if losses else {}
