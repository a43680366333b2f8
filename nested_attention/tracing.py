"""Seeing where attention went: `with trace(pipe) as maps: pipe(...)`.

Everything shown is a probability, a running mean over heads, layers and steps, on the conditional half only:

    outer  A(q, l)       how query q divides its attention among the words l; the subject's column is a_s(q)
    nested alpha(q, n)   which of the subject's tokens n answers at q
    lens   rho(q, p)     = sum_n alpha(q, n) beta(n, p): which patch p of the reference answers at q

Means are kept per resolution and third of the steps; storing every map of one SDXL picture would take 101 GB. Of a U-Net
with many layers every step looks into some of them, the next step into the next ones, so that watching stays cheap. A map is
a claim about routing, not about cause: to check it, mute the tokens (`Subject.muted`) and generate again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_attention.attention import LayerSubject, nested_probabilities, nested_values, outer_probabilities
from nested_attention.errors import NestedAttentionError

if TYPE_CHECKING:
    from nested_attention.pipeline import NestedAttentionPipeline
    from nested_attention.subjects import Subject

WATCHED = 10  # cross-attention layers that are looked into at a step
BLOCK = {"cpu": 1 << 20}  # by device, probabilities that exist at a time: on a CPU so few that they stay in its cache
LARGE_BLOCK = 1 << 28  # on other devices, where many small steps cost more than the memory
Grid = tuple[int, int]
Key = tuple[Grid, int]  # resolution of the feature map, third of the steps


class Mean:
    """A running mean of tensors of one shape."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.total = value.float().clone() if self.total is None else self.total.add_(value.float())
        self.count += 1


def combined(means: Sequence[Mean]) -> Tensor:
    """The mean over everything that was added to any of `means`."""
    return torch.stack([mean.total for mean in means if mean.total is not None]).sum(0) / sum(mean.count for mean in means)


@dataclass
class Recorder:
    """Collects the maps of one request.

    `grid`: height and width of the latent; `layers`: the number of cross-attention layers, of which about `WATCHED` are
    looked into at a step; `step`, `steps`: how many are done, of how many, set by the pipeline as it goes.
    """

    grid: Grid
    layers: int
    step: int = 0
    steps: int = 1
    names: dict[str, int] = field(default_factory=dict)  # layer -> its number, in the order of the first step
    valued: dict[Grid, str] = field(default_factory=dict)  # resolution -> the one layer whose values are kept
    outer: dict[Key, Mean] = field(default_factory=dict)
    nested: dict[tuple[Key, int], Mean] = field(default_factory=dict)
    values: dict[tuple[Key, int], tuple[Mean, Mean]] = field(default_factory=dict)

    def move_to_cpu(self) -> None:
        """Leaves the device to those who still draw: of a large model these are hundreds of megabytes."""
        for mean in (*self.outer.values(), *self.nested.values(), *(mean for pair in self.values.values() for mean in pair)):
            mean.total = None if mean.total is None else mean.total.cpu()

    def resolution(self, pixels: int) -> Grid:
        """The grid that a layer of `pixels` queries works on."""
        height, width = self.grid
        while height * width > pixels:
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    @torch.no_grad()
    def record(self, layer: str, query: Tensor, text: Callable[[], tuple[Tensor, Tensor]], subjects: Sequence[LayerSubject]) -> None:
        """`query (B, heads, HW, d)`; `text()`: keys and values `(B, heads, L, d)`, which are asked for if the layer is looked into."""
        number = self.names.setdefault(layer, len(self.names))
        watched = (number + self.step) % -(-self.layers // WATCHED) == 0
        grid = self.resolution(query.shape[2])
        valued = self.valued.setdefault(grid, layer) == layer  # values of different layers live in different spaces
        if not watched and not valued:
            return
        key, value = text()
        where = grid, min(2, 3 * self.step // self.steps)
        if watched:
            self.outer.setdefault(where, Mean()).add(outer_probabilities(query, key, subjects).mean(1))
        for which, subject in enumerate(subjects):
            if watched:
                self.nested.setdefault((where, which), Mean()).add(nested_mean(query, subject))
            if valued:
                query_values, words = self.values.setdefault((where, which), (Mean(), Mean()))
                word, nested = subject.word_value(value), subject.scaled(nested_values(query, subject), value)
                query_values.add(torch.lerp(word, nested, subject.strength).transpose(1, 2).flatten(2))
                words.add(word.transpose(1, 2).flatten(2))


def nested_mean(query: Tensor, subject: LayerSubject) -> Tensor:
    """alpha, the mean over heads, `(B, HW, N)`: some heads and queries at a time, which is faster than all at once."""
    batch, heads, pixels, _ = query.shape
    block = BLOCK.get(query.device.type, LARGE_BLOCK)
    each = max(1, block // (batch * pixels * subject.key.shape[2]))  # heads
    size = max(1, block // (batch * subject.key.shape[2]))  # queries
    total = torch.zeros(batch, pixels, subject.key.shape[2], device=query.device)
    for some, key in zip(query.split(each, 1), subject.key.split(each, 1), strict=True):
        mine = replace(subject, key=key)
        for part, into in zip(some.split(size, 2), total.split(size, 1), strict=True):
            into += nested_probabilities(part, mine).sum(1)
    return total / heads


@dataclass(frozen=True)
class SubjectMaps:
    """The maps of one subject. `resolution`: one of `Trace.resolutions`, or None for all, enlarged to the finest.

    `third`: 0, 1, 2 for the beginning, middle and end of the steps, or None for all of them.
    """

    recorder: Recorder
    subject: "Subject"
    index: int
    columns: tuple[int, ...]

    def outer(self, layer: Literal["mean"] | Grid = "mean", third: int | None = None) -> Tensor:
        """a_s: the share of attention that the subject's word gets, `(images, H, W)`, each in 0..1.

        With the shares of all other words it sums to 1. `layer`: "mean" over all, or a resolution.

        Raises:
            NestedAttentionError: no layer of this resolution or third of the steps was seen; so for the other maps.
        """
        return self.words(None if layer == "mean" else layer, third)[..., list(self.columns)].sum(-1)

    def words(self, resolution: Grid | None = None, third: int | None = None) -> Tensor:
        """A: the shares of all words, `(images, H, W, L)`; rows sum to 1."""
        return _gather(self.recorder.outer, resolution, third)

    def nested(self, resolution: Grid | None = None, third: int | None = None) -> Tensor:
        """alpha: which subject token answers where, `(images, H, W, N)`; rows sum to 1."""
        mine = {key: mean for (key, which), mean in self.recorder.nested.items() if which == self.index}
        return _gather(mine, resolution, third)

    def lens(self, resolution: Grid | None = None, third: int | None = None) -> Tensor:
        """rho: which patch of the reference pictures answers where, `(images, H, W, P)`; rows sum to 1.

        Patches of several reference pictures follow each other.
        """
        return self.nested(resolution, third) @ self.subject.reading().to(self.recorder_device())

    def values(self, resolution: Grid, third: int | None = None) -> tuple[Tensor, Tensor]:
        """V_q[s] of one layer with this resolution, `(images, H, W, C)`, and the plain word's V[s], `(C,)`."""
        mine = {key: means for (key, which), means in self.recorder.values.items() if which == self.index}
        found = [mine[key] for key in seen(mine, resolution, third)]
        query_values = combined([pair[0] for pair in found])
        return query_values.unflatten(1, resolution), combined([pair[1] for pair in found])[0, 0]

    def recorder_device(self) -> torch.device:
        return next(mean.total.device for mean in self.recorder.outer.values() if mean.total is not None)


def seen(maps: Iterable[Key], resolution: Grid | None, third: int | None) -> list[Key]:
    """Those of `maps` that have this resolution and third, None meaning any.

    Raises:
        NestedAttentionError: there is none.
    """
    known = sorted(maps, reverse=True)
    if found := [(grid, part) for grid, part in known if resolution in (None, grid) and third in (None, part)]:
        return found
    grids = ", ".join(f"{height} x {width}" for height, width in dict.fromkeys(grid for grid, _ in known))
    thirds = ", ".join(str(part) for part in sorted({part for _, part in known}))
    asked = f"resolution {resolution if isinstance(resolution, str | None) else f'{resolution[0]} x {resolution[1]}'}, third {third}"
    raise NestedAttentionError(f"no maps of {asked} were traced; there are resolutions {grids} and thirds {thirds}.")


def _gather(means: dict[Key, Mean], resolution: Grid | None, third: int | None) -> Tensor:
    """`(images, H, W, K)`: the mean over what was asked for, coarser grids enlarged to the finest (still sums to 1)."""
    found = seen(means, resolution, third)
    out = []
    for grid in dict.fromkeys(grid for grid, _ in found):  # the finest first
        picture = combined([means[key] for key in found if key[0] == grid]).unflatten(1, grid).permute(0, 3, 1, 2)  # (images, K, h, w)
        out.append(F.interpolate(picture, size=found[0][0], mode="nearest").permute(0, 2, 3, 1))
    return torch.stack(out).mean(0)


class Trace:
    """The maps of the last generation inside a `with trace(...)` block."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self._subjects: dict[str, tuple[int, Subject, tuple[int, ...]]] = {}

    def begin(self, grid: Grid, layers: int, subjects: "Sequence[Subject]", columns: Sequence[tuple[int, ...]]) -> Recorder:
        """Called by the pipeline when a generation starts."""
        self.recorder = Recorder(grid, layers)
        self._subjects = {s.placeholder: (k, s, c) for k, (s, c) in enumerate(zip(subjects, columns, strict=True))}
        return self.recorder

    @property
    def resolutions(self) -> tuple[Grid, ...]:
        """Grids of the layers that were seen, finest first."""
        seen = {grid for grid, _ in self.recorder.outer} if self.recorder else set()
        return tuple(sorted(seen, reverse=True))

    @property
    def thirds(self) -> tuple[int, ...]:
        """Parts of the steps that were seen: one or two steps do not make three."""
        return tuple(sorted({third for _, third in self.recorder.outer})) if self.recorder else ()

    @property
    def placeholders(self) -> tuple[str, ...]:
        return tuple(self._subjects)

    def subject(self, placeholder: str) -> SubjectMaps:
        """The maps of one subject of the traced generation, for instance `maps.subject("<person>")`.

        Raises:
            NestedAttentionError: nothing was generated with this subject inside the block.
        """
        if self.recorder is None or placeholder not in self._subjects:
            known = ", ".join(self._subjects) or "none"
            raise NestedAttentionError(
                f"no maps of {placeholder} were traced (traced subjects: {known}); generate with it inside the block."
            )
        index, subject, columns = self._subjects[placeholder]
        return SubjectMaps(self.recorder, subject, index, columns)


_active: ContextVar[tuple[tuple[object, Trace], ...]] = ContextVar("nested_attention_traces", default=())


@contextmanager
def trace(pipe: "NestedAttentionPipeline") -> Iterator[Trace]:
    """Traces what `pipe` generates inside the block, in this thread or task only; of blocks inside each other the innermost does."""
    maps = Trace()
    token = _active.set((*_active.get(), (pipe, maps)))
    try:
        yield maps
    finally:
        _active.reset(token)


def active_trace(pipe: object) -> Trace | None:
    """The trace that is open for `pipe` in the current context, if any."""
    return next((maps for traced, maps in reversed(_active.get()) if traced is pipe), None)
