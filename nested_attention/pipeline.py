"""The pipeline: load a base model and its adapters, encode subjects, generate, watch it happen.

The loaded pipeline is never changed by a request: each gets its own scheduler and its own stock diffusers pipeline
object around the shared modules, and carries its subjects in `cross_attention_kwargs`.
"""

import queue
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from nested_attention.adapters import Adapter, cross_attention_layers
from nested_attention.bases import Base
from nested_attention.condition import NestedCondition
from nested_attention.encoding import ImageEncoders, encode_subject
from nested_attention.errors import Cancelled, NestedAttentionError
from nested_attention.images import ImageSource, read_image
from nested_attention.loading import best_dtype, load_adapters, load_base, usable_device
from nested_attention.memory import LADDER, choose, free_gigabytes, is_out_of_memory, rungs, settle, spoken_shortage, too_little
from nested_attention.preview import clean_idea, preview
from nested_attention.processor import NestedAttnProcessor
from nested_attention.prompts import PLACEHOLDER, Prompt, fill
from nested_attention.settings import MAX_SUBJECTS, Settings, check_pictures
from nested_attention.subjects import Subject, SubjectCache
from nested_attention.tracing import Trace, active_trace


@dataclass(frozen=True)
class Generation:
    """The result: `images`, image k drawn with seed `settings.seed + k`, and the settings that repeat it."""

    images: list[Image.Image]
    settings: Settings


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` is done, of which some schedulers take more than were asked for; `previews()` shows the pictures so far."""

    step: int
    steps: int
    previews: Callable[[], list[Image.Image]]


class NestedAttentionPipeline:
    """A base model with its adapters. Use `from_pretrained`."""

    def __init__(
        self, base: Base, stock: DiffusionPipeline, adapters: Mapping[str, Adapter], folders: Mapping[str, Path],
        device: torch.device | None = None, rung: int = 0,
    ):  # fmt: skip
        self.base, self.stock, self.adapters = base, stock, dict(adapters)
        self.device = stock.unet.device if device is None else device
        self.rung = rung  # of `memory.LADDER`
        self.image_encoders = ImageEncoders(folders, self.device, stock.unet.dtype)
        self.cache = SubjectCache()
        self.decoding, self.vae_dtype = threading.Lock(), stock.vae.dtype
        self.reading = threading.Lock()
        self.own = type(type(stock).__name__, (ReadsInTurn, type(stock)), {"reading": self.reading})
        # on a GPU requests take turns: two at once need twice the memory, and parts that move would be pulled from under the other
        self.turn = nullcontext() if self.device.type == "cpu" else threading.Lock()
        stock.unet.set_attn_processor({name: NestedAttnProcessor(name) for name in stock.unet.attn_processors})

    @classmethod
    def from_pretrained(
        cls, base: str = "storybook", adapter: str | Path | Sequence[str | Path] | None = None,
        device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> "NestedAttentionPipeline":  # fmt: skip
        """Loads a base model by name, with the adapters that come along or the one or several that `adapter` names.

        `base`: a preset, a diffusers folder or a Hub repo id. `adapter`: a folder or a Hub repo id, or some of different kinds. Behind a repo id may
        stand `@` and a revision; without one its newest commit at the first download is recorded and used from then on.
        `device`: CUDA where there is one, then MPS, then CPU. `dtype`: float16 on a GPU; on a CPU bfloat16 where it
        computes in it, else float32. Where GPU memory is short, parts of the base wait outside; a line says which.

        Raises:
            NestedAttentionError: unknown base, missing or damaged files, two adapters of one kind, or too little memory.
        """
        target = usable_device(device)
        preset, stock = load_base(base, dtype or best_dtype(target))
        folders, adapters = load_adapters(preset, stock.unet, adapter, target)
        free = free_gigabytes(target)
        pipe = cls(preset, stock, adapters, folders, target, choose(preset, free, target, stock.unet.dtype))
        pipe.rung = settle(stock, target, pipe.rung)
        print(f"{preset.name} on {target}, {free:.1f} GB free: {LADDER[pipe.rung].name}", file=sys.stderr)
        return pipe

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of subject that can be encoded."""
        return tuple(self.adapters)

    def encode(
        self, kind: str, images: ImageSource | Sequence[ImageSource], placeholder: str | None = None, strength: float = 1.0,
        lam: float | None = None, token_weight: float = 1.0, cache: SubjectCache | None = None,
    ) -> Subject:  # fmt: skip
        """One or several pictures of a subject -> what stands for its placeholder.

        Args:
            kind: one of `kinds`.
            images: pictures, paths or bytes of one and the same subject, up to eight, taken as they are: for an adapter whose `framing` is
                "face", frame photos by `faces.frame` before.
            placeholder: how the prompt names it; `<kind>` if not given.
            strength, lam, token_weight: see `Subject`; `lam` defaults to the adapter's.
            cache: encoded pictures are looked up and kept here; the pipeline's own cache if not given.

        Raises:
            NestedAttentionError: unknown kind, unusable picture, none or too many, a setting out of range, or too little memory.
        """
        if kind not in self.adapters:
            raise NestedAttentionError(f"there is no adapter for {kind!r}; this pipeline knows {', '.join(self.kinds) or 'none'}.")
        adapter = self.adapters[kind]
        placeholder = (placeholder or f"<{kind}>").lower()
        if not PLACEHOLDER.fullmatch(placeholder):
            raise NestedAttentionError(f"{placeholder!r} is no placeholder; write a word in angle brackets, for instance <{kind}>.")
        sources = [images] if not isinstance(images, Sequence) or isinstance(images, str | bytes) else list(images)
        if not sources:
            raise NestedAttentionError(f"no picture of {placeholder} was given; add at least one.")
        check_pictures(placeholder, len(sources))
        pictures = [read_image(source) for source in sources]
        known = self.cache if cache is None else cache
        with spoken_shortage(too_little(self.device, f"encode {placeholder}")):
            encoder = self.image_encoders.get(adapter.config)
            return encode_subject(placeholder, pictures, adapter, encoder, known, strength, lam, token_weight)

    def __call__(
        self, prompt: str, subjects: Sequence[Subject] = (), *, callback: Callable[[Progress], None] | None = None,
        maps: Trace | None = None, **settings: Any,
    ) -> Generation:  # fmt: skip
        """Generates pictures of `prompt` with `subjects` in it.

        Args:
            prompt: names every subject by its placeholder. A placeholder that occurs twice means the same subject twice.
            subjects: up to four, each with its own placeholder.
            callback: called after every step; it may raise `Cancelled` to stop.
            maps: receives the attention maps; inside `with trace(pipe)` that block's trace does.
            settings: negative_prompt, num_images, steps, guidance_scale, seed, height, width; see `Settings`.

        Raises:
            NestedAttentionError: a setting is out of range, placeholders and subjects do not match, there is too little memory, or the
                base's safety checker blanked every picture.
        """
        checked = Settings.checked(self.base, prompt, **settings)
        filled = fill(prompt, words_of(subjects))
        columns = [self._columns(filled, subject) for subject in subjects]
        traced = maps or active_trace(self)

        def draw(rung: int) -> list[Image.Image]:
            return self._run(checked, filled.text, self._condition(checked, subjects, columns, traced, rung), callback)

        with self.turn:
            images = within_memory(draw, rung := self.rung)
            if images is None and rung < len(rungs(self.device)) - 1:
                images = within_memory(draw, self._step_down(rung))
        if images is None:
            raise NestedAttentionError(
                f"{self.device} has too little memory for {checked.num_images} pictures of {checked.width} x {checked.height}; "
                "ask for fewer or smaller ones, or close what else uses it."
            )
        return Generation(images, checked)

    def stream(
        self, prompt: str, subjects: Sequence[Subject] = (), *, maps: Trace | None = None, **settings: Any
    ) -> Generator[Progress | Generation]:
        """The same as a call, but yields `Progress` after every step, and the `Generation` last.

        Closing the iterator cancels the work after the step that is under way.
        """
        traced = maps or active_trace(self)  # now: the block may be left before the first step runs
        return self._stream(lambda callback: self(prompt, subjects, callback=callback, maps=traced, **settings))

    @staticmethod
    def _stream(generate: Callable[[Callable[[Progress], None]], Generation]) -> Generator[Progress | Generation]:
        events: queue.Queue[Progress | Generation | BaseException] = queue.Queue()
        stop = threading.Event()

        def report(progress: Progress) -> None:
            if stop.is_set():
                raise Cancelled
            events.put(progress)

        def work() -> None:
            try:
                events.put(generate(report))
            except BaseException as error:
                events.put(error)

        worker = threading.Thread(target=work, daemon=True, name="generation")
        worker.start()
        try:
            while not isinstance(event := events.get(), Generation):
                if isinstance(event, BaseException):
                    raise event
                yield event
            yield event
        finally:
            stop.set()
            worker.join()

    def _columns(self, filled: Prompt, subject: Subject) -> tuple[int, ...]:
        with self.reading:
            columns = filled.columns(subject.placeholder, self.stock.tokenizer)
        if len(columns) < len(filled.spans[subject.placeholder]):
            limit = self.stock.tokenizer.model_max_length - 2
            raise NestedAttentionError(
                f"{subject.placeholder} stands behind the {limit} words that the text encoder reads; move it forward or shorten the prompt."
            )
        return columns

    def _condition(
        self, settings: Settings, subjects: Sequence[Subject], columns: Sequence[tuple[int, ...]], maps: Trace | None, rung: int
    ) -> NestedCondition:
        layers: dict[str, list] = {}
        for subject, places in zip(subjects, columns, strict=True):
            mask = torch.zeros(1, self.stock.tokenizer.model_max_length, device=self.device)
            mask[0, list(places)] = 1.0
            for name, layer in subject.layer_subjects(mask).items():
                layers.setdefault(name, []).append(layer)
        recorder = None
        if maps is not None:
            scale = self.stock.vae_scale_factor
            grid = settings.height // scale, settings.width // scale
            recorder = maps.begin(grid, len(cross_attention_layers(self.stock.unet)), subjects, columns)
        return NestedCondition(settings.num_images, layers, recorder, LADDER[rung].slice)

    def _step_down(self, rung: int) -> int:
        """From the rung of a request to the next one, for good, unless another request went there meanwhile. Returns where it is now."""
        if self.rung == rung:
            self.cache.clear()
            self.rung = settle(self.stock, self.device, rung + 1)
            print(f"{self.base.name}: out of memory; from now on {LADDER[self.rung].name}", file=sys.stderr)
        return self.rung

    def _run(
        self, settings: Settings, text: str, condition: NestedCondition, callback: Callable[[Progress], None] | None
    ) -> list[Image.Image]:
        stock = own_copy(self.stock, self.own)
        until_drawn = ExitStack()
        until_drawn.callback(self.stock.maybe_free_model_hooks)  # the copy knows no hooks: what it left on the device goes home

        def after_step(_: object, step: int, timestep: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if condition.recorder is not None:
                condition.recorder.step, condition.recorder.steps = step + 1, stock.num_timesteps
            if callback is not None:
                idea = clean_idea(stock.scheduler, kwargs["latents"], timestep)
                callback(Progress(step + 1, stock.num_timesteps, lambda: preview(stock, idea)))
            if step + 1 == stock.num_timesteps:  # what follows is decoding, for which SDXL's shared VAE changes its dtype
                until_drawn.enter_context(self.decoding)
                # and back only if nothing fails; `Module.to`, because a diffusers model warns whenever its dtype is set
                until_drawn.callback(torch.nn.Module.to, self.stock.vae, self.vae_dtype)
            return kwargs

        generators = [torch.Generator("cpu").manual_seed(settings.seed + k) for k in range(settings.num_images)]
        with until_drawn:
            drawn = stock(
                prompt=text, negative_prompt=settings.negative_prompt, height=settings.height, width=settings.width,
                num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale,
                num_images_per_prompt=settings.num_images, generator=generators,
                cross_attention_kwargs={"nested": condition}, callback_on_step_end=after_step,
            )  # fmt: skip
        tell_blanked(self.base.name, settings, getattr(drawn, "nsfw_content_detected", None) or [])
        return drawn.images


def within_memory(draw: Callable[[int], list[Image.Image]], rung: int) -> list[Image.Image] | None:
    """What is drawn on `rung`, or None if the device's memory does not suffice. Leaving `except` lets go of what filled it."""
    try:
        return draw(rung)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def tell_blanked(base: str, settings: Settings, blanked: Sequence[bool]) -> None:
    """Says in one line which pictures a safety checker, which SD 1.5 has, made black; `blanked` is empty where there is none.

    Raises:
        NestedAttentionError: it is all of them.
    """
    seeds = [settings.seed + k for k, black in enumerate(blanked) if black]
    if len(seeds) == settings.num_images:
        raise NestedAttentionError(f"the safety checker of {base} blanked every picture; try another seed or prompt.")
    if seeds:
        said = ", ".join(map(str, seeds))
        print(f"{base}: its safety checker blanked the pictures of seed {said}; try others, or another prompt", file=sys.stderr)


def words_of(subjects: Sequence[Subject]) -> dict[str, str]:
    """Placeholder -> word, checked.

    Raises:
        NestedAttentionError: more than four subjects, or two with the same placeholder.
    """
    if len(subjects) > MAX_SUBJECTS:
        raise NestedAttentionError(f"{len(subjects)} subjects were given; at most {MAX_SUBJECTS} fit into one picture.")
    words = {subject.placeholder: subject.word for subject in subjects}
    if len(words) < len(subjects):
        names = [subject.placeholder for subject in subjects]
        twice = next(name for name in names if names.count(name) > 1)
        raise NestedAttentionError(f"two subjects are called {twice}; give each its own placeholder, for instance {twice[:-1]}2>.")
    return words


class ReadsInTurn:
    """What makes a stock pipeline read prompts in turn with others that hold `reading`.

    They share tokenizers, and a tokenizer keeps in itself how it pads and cuts, which every call sets anew. Copies take too long to make.
    """

    reading: threading.Lock

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        with self.reading:
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]


def own_copy(stock: DiffusionPipeline, kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A pipeline object of a request's own, of `kind`: the shared modules, a fresh scheduler, no progress bar."""
    parts = dict(stock.components, scheduler=type(stock.scheduler).from_config(stock.scheduler.config))
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    own = kind(**parts, **extra)
    own.set_progress_bar_config(disable=True)
    return own
