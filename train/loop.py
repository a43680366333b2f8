"""The one training loop: every command gives it a `Task`.

A run is a folder: `config.json`, `log.jsonl` (one line a tick), `state/` (the last checkpoint) and `grids/`.
The same command resumes it. Sample `n` of the run is a function of `n`, so a run that was stopped goes on exactly, and
several processes (`accelerate launch`) take the samples of a batch in turn. Together they do what one would where the loss is
a mean over samples, as on photos. What sets the samples of a batch against each other sees those of one process and one of the
`accumulation` passes: pairs in the encoder's and the judge's training, routing and alignment in the base's, and what is `even`.
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
from accelerate.utils import broadcast_object_list, is_tensorboard_available
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from nested_attention.errors import NestedAttentionError
from nested_attention.files import replaced
from nested_attention.loading import computes_bfloat16
from train.feed import feed
from train.optim import build_optimizers
from train.processes import asked_to_shard, shard, synchronize, this_process
from train.settings import LoopConfig, check, spoken_memory
from train.start import check_start
from train.state import Average, Checkpoint, learning, load_optimizer_tensors, load_weights, optimizer_tensors, whole

Batch = dict[str, Tensor]
LOG = "log.jsonl"


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
        """The loss of a batch, or of the part of one that comes in one pass, and numbers for the log."""

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


class Trainer:
    """A run under way, brought to where it stopped last time. `step`, `seconds`: what is done of it."""

    def __init__(self, task: Task, config: LoopConfig, folder: Path, sharded: bool):
        precision = config.mixed_precision or ("bf16" if computes_bfloat16(this_process().device) else "no")
        board = "tensorboard" if config.tensorboard else None
        self.accelerator = Accelerator(mixed_precision=precision, log_with=board, project_dir=folder)
        if config.tensorboard and not is_tensorboard_available():
            self.accelerator.print(f"TensorBoard is not installed, so that this run has only {LOG}; `pip install tensorboard` for curves.")
        self.processes, self.device = self.accelerator.num_processes, self.accelerator.device
        self.task, self.config, self.folder, self.sharded = task, config, folder, sharded
        self.model = task.model.to(self.device)
        if sharded:
            shard(self.model, task.units(), self.device, self.processes)
        self.optimizers = build_optimizers(self.model, config.lr, config.muon_lr, config.not_muon, task.white(), config.white_lr)
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.average = Average(self.model)
        self.checkpoint = Checkpoint(folder / "state")
        self.step, self.seconds = 0, 0.0
        self.resume()
        if self.accelerator.is_main_process:
            self.shorten_log()
        self.prepared = self.model if sharded else self.accelerator.prepare(self.model)
        self.forward = torch.compile(self.prepared) if config.compile else self.prepared
        self.sums: dict[str, float] = {}  # of what is logged, since `tick`
        self.summed = 0  # steps that are in `sums`: after a resume fewer than usual
        self.tick = 0.0

    def resume(self) -> None:
        """Goes on from the run's checkpoint, if there is one.

        Raises:
            NestedAttentionError: it is damaged, or that of another model.
        """
        if loaded := self.checkpoint.load():
            tensors, progress = loaded
            self.step, self.seconds = progress["step"], progress["seconds"]
            load_weights(self.average.current, tensors["model"])
            load_weights(self.average.tensors, tensors["average"])
            load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])

    def shorten_log(self) -> None:
        """Takes away the lines of steps behind the checkpoint, which the run now does again.

        Raises:
            NestedAttentionError: the disk is full.
        """
        if (log := self.folder / LOG).exists():
            with replaced(log) as fresh:
                lines = log.read_text().splitlines(keepends=True)
                fresh.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def save(self) -> None:
        """Writes the checkpoint.

        Raises:
            NestedAttentionError: the disk is full.
        """
        moments = optimizer_tensors(self.model, self.optimizers)
        state = {"model": self.average.current, "average": self.average.tensors, "optimizer": moments}
        gathered = {name: {key: whole(value) for key, value in content.items()} for name, content in state.items()}
        if self.accelerator.is_main_process:
            self.checkpoint.save(gathered, {"step": self.step, "seconds": round(self.seconds)})

    def learn(self, batches: Iterator[Batch]) -> None:
        """One step: the gradients of one batch, in `accumulation` parts, and what the optimizers make of them.

        Raises:
            NestedAttentionError: loss or gradient is not finite. Nothing has learned from it yet; see also `feed`.
        """
        accelerator, parts = self.accelerator, self.config.accumulation
        for part in range(parts):
            batch = moved(next(batches), self.device)
            last = part == parts - 1
            synchronize(self.model, last)
            with training_attention(self.device), nullcontext() if last or self.sharded else accelerator.no_sync(self.prepared):
                with accelerator.autocast():
                    loss, logs = self.task.loss(self.forward, batch)
                accelerator.backward(loss / parts)
            for key, value in {"loss": float(loss.detach()), **logs}.items():
                self.sums[key] = self.sums.get(key, 0.0) + value / parts
        norm = float(whole(torch.nn.utils.clip_grad_norm_(learning(self.model).values(), self.config.clip)))
        if not math.isfinite(norm):  # that of all processes together, as it is whenever a loss is not finite
            raise NestedAttentionError(
                f"the loss {loss.item()} or its gradient {norm} is not finite at step {self.step + 1}; lower lr or muon_lr and give the same "
                "command, it goes on from the last checkpoint."
            )
        self.sums["norm"] = self.sums.get("norm", 0.0) + norm
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.config.rate(self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.summed += 1
        self.average.update(min(self.config.ema, (1 + self.step) / (10 + self.step)))

    def due(self, every: int) -> bool:
        """Whether it is time for what is done every so many steps."""
        return self.step % every == 0

    def measured(self) -> dict[str, float]:
        """The line for the log, where one is due: means over the steps since the last one, and the held-out loss."""
        config, line = self.config, {}
        if self.due(config.log_every) or self.step == config.steps:
            means = self.accelerator.reduce(torch.tensor(list(self.sums.values()), device=self.device) / self.summed, "mean")
            now = time.monotonic()
            passed = now - self.tick
            self.seconds += passed
            line = {key: round(value, 5) for key, value in zip(self.sums, means.tolist(), strict=True)}
            line |= {"rate": round(config.rate(self.step), 4), "samples_per_s": round(self.summed * config.batch_size / passed, 2)}
            line |= {"hours": round(self.seconds / 3600, 3)}
            self.sums, self.summed, self.tick = {}, 0, now
        if config.held_out_every and (self.due(config.held_out_every) or self.step == config.steps):
            with self.accelerator.autocast(), self.average.in_place():
                line |= held_out_loss(self.task, self.device)
        return line

    def write(self, line: dict[str, float]) -> None:
        """Adds a line to the log.

        Raises:
            NestedAttentionError: the disk is full.
        """
        if line and self.accelerator.is_main_process:
            with replaced(log := self.folder / LOG) as fresh:  # a full disk would leave half a line
                fresh.write_text((log.read_text() if log.exists() else "") + json.dumps({"step": self.step, **line}) + "\n")
            self.accelerator.log(line, self.step)

    def draw(self) -> None:
        """Draws the sample grid.

        Raises:
            NestedAttentionError: the disk is full.
        """
        if not (self.sharded or self.accelerator.is_main_process):
            return
        with self.accelerator.autocast(), self.average.in_place():
            grid = self.task.grid()
        if grid is not None and self.accelerator.is_main_process:
            with replaced(self.folder / f"grids/{self.step:06d}.png") as fresh:
                grid.save(fresh, "png")


def fit(task: Task, config: LoopConfig, folder: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    """Trains `task.model` up to `config.steps`. Returns the moving average of what learned, by parameter, on the CPU.

    `description` is written next to the run, so that anyone can see how it was made; "start" in it is `train.start.noted`.

    Raises:
        NestedAttentionError: a setting cannot be used, see `check`, or the run's checkpoint cannot, or a sample; it began with
            another start; the disk is full, or the memory; the loss is no longer finite.
    """
    sharded = asked_to_shard()
    check(config, this_process().num_processes, sharded)
    check_start(folder, description.get("start"))
    run = Trainer(task, config, folder, sharded)
    accelerator = run.accelerator
    if accelerator.is_main_process:
        made = {"loop": asdict(config), "processes": run.processes, "sharded": sharded, **description}
        with replaced(folder / "config.json") as fresh:
            fresh.write_text(json.dumps(made, indent=2))
    if run.step:
        accelerator.print(f"{folder}: goes on from step {run.step} of {config.steps}")
    accelerator.init_trackers("")
    batches = iterate(task, config, Share(config.behind + run.step, accelerator.process_index, run.processes))
    saved = run.tick = time.monotonic()
    with spoken_memory(config, run.processes):
        while run.step < config.steps:
            run.learn(batches)
            last = run.step == config.steps
            run.write(run.measured())
            if run.due(config.grid_every) or last:
                run.draw()
            if agreed(accelerator, time.monotonic() - saved > 60 * config.save_minutes) or last:
                run.save()
                saved = time.monotonic()
    for tracker in accelerator.trackers:
        tracker.finish()
    return {name: whole(value) for name, value in run.average.tensors.items()}


def last_logged(folder: Path) -> dict[str, float]:
    """The last value of everything in the log of a run; nothing if it has none."""
    logged: dict[str, float] = {}
    for line in (folder / LOG).read_text().splitlines() if (folder / LOG).exists() else ():
        logged |= json.loads(line)
    return logged


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return {key: value.to(device) for key, value in batch.items()}


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
    samples = task.dataset((config.behind + config.steps) * config.batch_size)
    return feed(samples, task.batches(config, share), config.workers)


@torch.no_grad()
def held_out_loss(task: Task, device: torch.device) -> dict[str, float]:
    """For the log: the mean loss over `task.held_out()`, with the same noise every time; nothing if nothing is held out."""
    losses = [task.loss(task.model, moved(batch, device))[0] for batch in task.held_out()]
    return {"held_out": round(float(torch.stack(losses).mean()), 5)} if losses else {}
