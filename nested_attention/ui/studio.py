"""What the app can do, without Gradio: sessions, models, subjects from slots, generation, explanation."""

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from nested_attention import Generation, NestedAttentionError, NestedAttentionPipeline, Progress, Subject, SubjectCache
from nested_attention.bases import Base
from nested_attention.estimate import estimate
from nested_attention.faces import Face, Framed, find_faces, frame
from nested_attention.heap import give_back_freed
from nested_attention.images import read_image
from nested_attention.loading import base_folder, known_base
from nested_attention.prompts import placeholders, slot_names
from nested_attention.provenance import Provenance, SubjectNote
from nested_attention.settings import check_pictures
from nested_attention.subjects import EncodedImage
from nested_attention.tracing import Trace
from nested_attention.ui.session import Result, Run, Session, Slot, keep_last

Choice = tuple[str, str | None]  # names of a base and an adapter, None for those of the base
CHOICES = 1000  # of visitors, that are remembered beyond their sessions
PURGE_SECONDS = 60.0
JOINING = {"in", "on", "at", "under", "by", "with", "wearing", "among", "near", "next", "smiling", "and"}


class Studio:
    """The app's models and visitors. Safe to call from many threads; visitors share nothing but the weights.

    `pipe` is what everybody starts with; `adapter` is the one that was named to load it, None for those of the base. One
    other model is kept beside it; the next one takes its place, and whoever still works with the old one keeps it until the
    end of the session. A request takes its model once, for it may be changed while it is being answered.
    """

    def __init__(self, pipe: NestedAttentionPipeline, adapter: str | None = None):
        self.pipe, self.adapter = pipe, adapter
        self._other: tuple[Choice, NestedAttentionPipeline] | None = None
        self._sessions: dict[str, Session] = {}
        self._chosen: dict[str, Choice] = {}  # by the keys of sessions
        self._lock, self._loading = Lock(), Lock()

    def choose_model(self, key: str, base: str, adapter: str | None) -> NestedAttentionPipeline:
        """Gives the session of one visitor another model, loaded (and fetched) first if need be. Its subjects are forgotten.

        Raises:
            NestedAttentionError: the model or the adapter cannot be had, or a CPU has too little memory for them. If the session's
                own model had to go to find that, it has the first one from then on.
        """
        with self._loading:
            choice = base, adapter
            if (chosen := self._loaded(choice)) is None:
                preset = known_base(base)
                if self._shortage(preset, adapter):
                    self._let_go(key)  # perhaps that is enough
                    if shortage := self._shortage(preset, adapter):
                        raise NestedAttentionError(shortage)
                base_folder(preset)  # what cannot be had changes nothing
                self._let_go(key)  # two large models at once would not fit into most GPUs
                chosen = NestedAttentionPipeline.from_pretrained(base, adapter, self.pipe.device)
                self._other = choice, chosen
            keep_last(self._chosen, key, choice, CHOICES)
        self.session(key).turn_to(chosen)
        return chosen

    def _loaded(self, choice: Choice) -> NestedAttentionPipeline | None:
        """The model of a choice, if it is here."""
        if choice == (self.pipe.base.name, self.adapter):
            return self.pipe
        return self._other[1] if self._other is not None and self._other[0] == choice else None

    def _let_go(self, key: str) -> None:
        """Gives up the other model, also where the session has it."""
        self._chosen.pop(key, None)
        self.session(key).turn_to(self.pipe)
        self._other = None
        gc.collect()
        give_back_freed()

    def _shortage(self, preset: Base, adapter: str | None) -> str | None:
        """What to say where a CPU has too little memory for a model: the system would end the app for everybody. A GPU has its ladder."""
        cost = estimate(preset, self.pipe.device, adapter)
        if self.pipe.device.type != "cpu" or cost.fits:
            return None
        return (
            f"{preset.name} would take {cost.memory:.1f} GB of memory here, of which only {cost.free:.1f} GB are free; "
            "choose a smaller model, or close what else uses it."
        )

    def session(self, key: str) -> Session:
        """The session of one visitor, who comes back with the model that they had, if it is still loaded."""
        with self._lock:
            if key not in self._sessions:
                choice = self._chosen.get(key, (self.pipe.base.name, self.adapter))
                pipe = self._loaded(choice)
                self._sessions[key] = Session(self.pipe, lost=choice[0]) if pipe is None else Session(pipe)
            session = self._sessions[key]
            session.use()
            return session

    def purge(self) -> None:
        """Drops the sessions that were not used for long, and with them the visitors' pictures."""
        with self._lock:
            self._sessions = {key: session for key, session in self._sessions.items() if not session.over}

    def purge_for_ever(self) -> None:
        """For a thread of its own: nobody else may come to drop the last visitor's session."""
        while True:
            time.sleep(PURGE_SECONDS)
            self.purge()

    def close(self, key: str) -> None:
        """A visitor's line is down: what is being drawn ends, and the session soon, unless they come back."""
        with self._lock:
            if key in self._sessions:
                self._sessions[key].leave()

    def encode(
        self, session: Session, pipe: NestedAttentionPipeline, slot: Slot, placeholder: str | None = None,
        framed: Sequence[Framed] | None = None, **knobs: Any,
    ) -> Subject:  # fmt: skip
        """Encodes the pictures of one subject. `framed`: they, if that was done already.

        Raises:
            NestedAttentionError: the slot has no picture or too many, one cannot be used, or a value is out of its range.
        """
        pictures = [made.image for made in (framed_pictures(slot, session.faces) if framed is None else framed)]
        subject = pipe.encode(slot.kind, pictures, placeholder, slot.strength, cache=session.cache, **knobs)
        for image, file in zip(subject.images, slot.files, strict=True):
            session.sources[picture_hash(image)] = replace(slot, files=(file,))
        return subject

    def subjects_of_slots(self, session: Session, pipe: NestedAttentionPipeline, slots: Sequence[Slot], **knobs: Any) -> list[Subject]:
        """The subjects of all slots that hold a picture.

        Raises:
            NestedAttentionError: as of `encode`.
        """
        return [self.encode(session, pipe, slot, name, **knobs) for name, slot in named_slots(slots).items()]

    def generate(
        self, session: Session, run: Run, pipe: NestedAttentionPipeline, prompt: str, subjects: Sequence[Subject], **settings: Any
    ) -> Iterator[Progress | Result]:
        """Progress after every step, then the result, which the session keeps and which ends the run; less if the run is stopped.

        Raises:
            NestedAttentionError: the prompt or a setting cannot be used, memory ran out, or the pictures cannot be saved.
        """
        maps = Trace()
        with closing(pipe.stream(prompt, subjects, maps=maps, **settings)) as stream:
            for event in session.until_stopped(run, stream):
                if isinstance(event, Progress):
                    yield event
                    continue
                result = self._keep(session, pipe, event, tuple(subjects), maps)
                if session.end(run):
                    session.result = result
                    yield result

    def without_subjects(self, session: Session, run: Run, result: Result) -> Iterator[Progress | Image.Image]:
        """The first picture of a result once more, its subjects as ordinary words: as of `generate`, the picture last.

        Raises:
            NestedAttentionError: memory ran out.
        """
        ordinary = [subject.but(strength=0.0) for subject in result.subjects]
        settings = result.generation.settings.as_dict() | {"num_images": 1}
        with closing(result.pipe.stream(settings.pop("prompt"), ordinary, **settings)) as stream:
            for event in session.until_stopped(run, stream):
                if isinstance(event, Progress):
                    yield event
                elif session.end(run):
                    yield event.images[0]

    def _keep(
        self, session: Session, pipe: NestedAttentionPipeline, generation: Generation, subjects: tuple[Subject, ...], maps: Trace
    ) -> Result:
        files = []
        for image, made in zip(generation.images, provenances(pipe, generation, subjects, session.sources), strict=True):
            path = Path(session.folder.name) / f"{time.time_ns()}-seed{made.settings.seed}.png"
            made.save(image, path)
            files.append(str(path))
        if maps.recorder is not None:
            maps.recorder.move_to_cpu()
        return Result(pipe, generation, subjects, maps, tuple(files))


def picture_hash(image: EncodedImage) -> str:
    """How a PNG remembers a reference picture."""
    return SubjectCache.key(image.picture, "")[0]


def provenances(
    pipe: NestedAttentionPipeline, generation: Generation, subjects: Sequence[Subject], sources: Mapping[str, Slot]
) -> list[Provenance]:
    """How each picture of a generation was made, so that it can be drawn again alone: picture k with seed + k.

    `sources`: as in `Session`; pictures that are not there were given whole.
    """
    notes = tuple(noted(pipe, subject, sources) for subject in subjects)
    name, settings = pipe.base.name, generation.settings
    return [Provenance(name, replace(settings, seed=settings.seed + k, num_images=1), notes) for k in range(len(generation.images))]


def noted(pipe: NestedAttentionPipeline, subject: Subject, sources: Mapping[str, Slot]) -> SubjectNote:
    """What a PNG remembers of a subject that `pipe` encoded."""
    pictures = tuple(map(picture_hash, subject.images))
    slot = sources.get(pictures[0], Slot(subject.kind, ()))
    revision = pipe.adapters[subject.kind].revision
    return SubjectNote(
        subject.placeholder, subject.kind, subject.strength, subject.lam, subject.token_weight, pictures, revision, slot.framing, slot.crop
    )


def framed_pictures(slot: Slot, find: Callable[[Image.Image, str], list[Face]] = find_faces) -> list[Framed]:
    """The pictures of a slot as the adapter gets to see them, and what was done to each. `find`: as of `faces.frame`.

    Raises:
        NestedAttentionError: there are too many pictures, or one or the crop cannot be used.
    """
    check_pictures(slot.kind, len(slot.files))
    return [frame(read_image(file), slot.kind, slot.framing, slot.crop, find) for file in slot.files]


def named_slots(slots: Sequence[Slot]) -> dict[str, Slot]:
    """Placeholder -> slot, of those that hold a picture."""
    filled = [slot for slot in slots if slot.files]
    return dict(zip(slot_names([slot.kind for slot in filled]), filled, strict=True))


def missing_placeholders(prompt: str, slots: Sequence[Slot]) -> dict[str, str]:
    """Placeholder -> kind, of the filled slots that the prompt does not name. A slot without a kind cannot be named."""
    return {name: slot.kind for name, slot in named_slots(slots).items() if slot.kind and name not in placeholders(prompt)}


def put_into_prompt(prompt: str, placeholder: str, words: Sequence[str]) -> str:
    """Writes a forgotten placeholder into the prompt: in place of the first of `words` that stands there, else in front."""
    for word in words:
        alone = re.compile(rf"(?<![\w<-]){re.escape(word)}(?![\w>-])", re.IGNORECASE)  # not the `person` of `<person>`
        if alone.search(prompt):
            return alone.sub(placeholder, prompt, count=1)
    if not prompt.strip():
        return placeholder
    if placeholders(prompt):
        return f"{placeholder} and {prompt}"
    return f"{placeholder} {prompt}" if prompt.split()[0].lower() in JOINING else f"{placeholder}, {prompt}"
