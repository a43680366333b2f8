"""One step of a full-size U-Net with random weights: stock, ours, and the yardsticks, one after the other in turn."""

import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from nested_attention.adapters import cross_attention_layers
from nested_attention.attention import LayerSubject
from nested_attention.bases import UNETS, unet_settings
from nested_attention.bench.timing import seconds_of, wait_for_device
from nested_attention.bench.yardsticks import DecoupledProcessor, DirectProcessor, randomize
from nested_attention.condition import NestedCondition
from nested_attention.heap import give_back_freed
from nested_attention.loading import best_device, best_dtype
from nested_attention.processor import NestedAttnProcessor
from nested_attention.tracing import Recorder

SCALES = "storybook", *UNETS
LENGTH, COLUMNS = 77, (5, 9, 13, 17)  # text tokens, and where the subjects' words stand
COUNTS, SIZES = (1, 2, 4), (16, 256, 1024)
OFTEN = 4  # a stock step comes before so many others


def build_unet(scale: str) -> UNet2DConditionModel:
    """The U-Net on the best device in its best dtype, random weights."""
    device = best_device()
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_settings(scale))
    unet = unet.to(best_dtype(device)).to_empty(device=device).eval().requires_grad_(False)
    randomize(unet)
    unet.set_attn_processor({name: NestedAttnProcessor(name) for name in unet.attn_processors})
    return unet


@dataclass
class Bench:
    """A U-Net and its inputs for one step with guidance: a batch of two."""

    unet: UNet2DConditionModel

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        config = self.unet.config
        side, self.like = config.sample_size, {"device": self.unet.device, "dtype": self.unet.dtype}
        self.latents = torch.randn(2, config.in_channels, side, side, **self.like)
        self.states = torch.randn(2, LENGTH, config.cross_attention_dim, **self.like)
        self.added = None
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            self.added = {"text_embeds": torch.randn(2, pooled, **self.like), "time_ids": torch.full((2, 6), 1024.0, **self.like)}
        self.layers = cross_attention_layers(self.unet)
        self.ours = dict(self.unet.attn_processors)

    @torch.no_grad()
    def step(self, condition: NestedCondition | None = None) -> None:
        kwargs = None if condition is None else {"nested": condition}
        self.unet(self.latents, 500, self.states, added_cond_kwargs=self.added, cross_attention_kwargs=kwargs)

    def condition(self, count: int, tokens: int, traced: bool = False) -> NestedCondition:
        """`count` subjects of `tokens` tokens each, keys and values already projected."""
        one = torch.ones((), device=self.unet.device)
        layers: dict[str, list[LayerSubject]] = {}
        for column in COLUMNS[:count]:
            columns = torch.zeros(1, LENGTH, device=self.unet.device)
            columns[0, column] = 1
            for name, attention in self.layers.items():
                shape = 1, attention.heads, tokens, attention.to_k.out_features // attention.heads
                key, value = torch.randn(shape, **self.like), torch.randn(shape, **self.like)
                layers.setdefault(name, []).append(LayerSubject(columns, key, value, one, one, one, "full"))
        side = self.unet.config.sample_size
        return NestedCondition(1, layers, Recorder((side, side), len(self.layers)) if traced else None)

    def processors(self, make: Callable[[Attention], object]) -> dict[str, object]:
        """Another processor for every cross-attention layer, ours for the rest."""
        return self.ours | {name: make(attention) for name, attention in self.layers.items()}

    def install(self, processors: dict[str, object] | None = None) -> None:
        """`processors` into all layers; without them ours."""
        self.unet.set_attn_processor(dict(processors or self.ours))

    def tokens(self, count: int) -> Tensor:
        return torch.randn(1, count, self.unet.config.cross_attention_dim, **self.like)


def cache_megabytes(condition: NestedCondition) -> float:
    return sum(x.nbytes for layer in condition.layers.values() for s in layer for x in (s.key, s.value)) / 1e6


@dataclass(frozen=True)
class Step:
    """What is timed, the processors that it needs, and the megabytes of its key/value cache."""

    run: Callable[[], None]
    processors: dict[str, object]
    cache: float = 0.0


@torch.no_grad()
def ours(count: int, tokens: int, traced: bool, bench: Bench, number: int) -> Step:
    condition = bench.condition(count, tokens, traced)
    if number:  # what a first step makes of the text and later ones find; not before the memory is measured, so that it counts there
        for name, attention in bench.layers.items():
            condition.text(name, attention, bench.states)
    if condition.recorder is not None:
        condition.recorder.step = number  # which layers are recorded depends on it
    return Step(lambda: bench.step(condition), bench.ours, cache_megabytes(condition))


def stock(bench: Bench, number: int) -> Step:
    return Step(bench.step, bench.ours)


def direct(bench: Bench, number: int) -> Step:
    return Step(bench.step, bench.processors(lambda attention: DirectProcessor(attention, bench.tokens(1024), COLUMNS[0])))


def decoupled(bench: Bench, number: int) -> Step:
    return Step(bench.step, bench.processors(lambda attention: DecoupledProcessor(attention, bench.tokens(16))))


VARIANTS: dict[str, Callable[[Bench, int], Step]] = {  # name -> what prepares it for a round of the given number
    "stock": stock,
    "ours, no subject": partial(ours, 0, 0, False),
    **{f"ours, {count} x {tokens}": partial(ours, count, tokens, False) for count in COUNTS for tokens in SIZES},
    "ours, 1 x 1024, traced": partial(ours, 1, 1024, True),
    "direct form, 1 x 1024": direct,
    "decoupled cross-attention, 16": decoupled,
}


def step_table(bench: Bench, repeats: int, only: list[str] | None) -> dict[str, dict[str, float]]:
    """Median seconds of a step, its ratios to the stock steps of the same round, median, least and largest, peak memory and what it is
    above stock's, and the cache."""
    names = ["stock", *(name for name in VARIANTS if name != "stock" and (not only or name in only))]
    peaks, caches = {}, {}
    for name in names:  # made and dropped one after the other, since not all caches fit at once
        step = prepared(bench, name, 0)
        peaks[name], caches[name] = peak_of(step.run) + step.cache, step.cache
        del step
    print("  each once, a warm-up", file=sys.stderr, flush=True)
    rounds: list[dict[str, float]] = []
    for number in range(1, repeats + 1):
        rounds.append(one_round(bench, names[1:], number))
        print(f"  round {number} of {repeats}", file=sys.stderr, flush=True)
    bench.install()
    table: dict[str, dict[str, float]] = {}
    for name in names:
        ratios = [taken[name] / taken["stock"] for taken in rounds]
        table[name] = {
            "seconds": statistics.median(taken[name] for taken in rounds),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
            "peak_mb": peaks[name],
            "extra_mb": peaks[name] - peaks["stock"],
            "cache_mb": caches[name],
        }
    return table


def one_round(bench: Bench, names: list[str], number: int) -> dict[str, float]:
    """Seconds of a step of each of `names`, in an order of chance; of the stock one the mean, since it is what all are compared to."""
    beside: list[float] = []
    taken: dict[str, float] = {}
    order = random.Random(number).sample(names, len(names))
    for start in range(0, max(1, len(order)), OFTEN):
        beside.append(seconds_of(prepared(bench, "stock", number).run))
        taken |= {name: seconds_of(prepared(bench, name, number).run) for name in order[start : start + OFTEN]}
    return {"stock": statistics.mean(beside), **taken}


def prepared(bench: Bench, name: str, number: int) -> Step:
    """A variant for the round `number`, with its processors in their layers."""
    step = VARIANTS[name](bench, number)
    bench.install(step.processors)
    return step


def peak_of(step: Callable[[], None]) -> float:
    """Its peak memory in MB above what was held before: weights and the key/value cache."""
    cuda = torch.cuda.is_available()
    before = reset_peak(cuda)
    step()
    wait_for_device()
    return peak_megabytes(cuda) - before


def reset_peak(cuda: bool) -> float:
    """Forgets the peak so far; returns what is held now, in MB."""
    wait_for_device()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    clear = Path("/proc/self/clear_refs")
    if clear.exists():  # Linux
        give_back_freed()  # else what was freed before counts as held, and a step that needs it again seems to need none
        clear.write_text("5")  # resets the peak of resident memory
    return status_megabytes("VmRSS")


def peak_megabytes(cuda: bool) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if cuda else status_megabytes("VmHWM")


def status_megabytes(field: str) -> float:
    """A line of Linux's `/proc/self/status` in MB; 0 on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field)), 0.0)
