"""What the app can do, without Gradio: sessions, models, subjects from slots, generation, explanation."""

import gc
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from nested_attention import Generation, NestedAttentionPipeline, Progress, Subject, SubjectCache
from nested_attention.bases import find_base
from nested_attention.faces import Framed, frame
from nested_attention.images import read_image
from nested_attention.loading import base_folder
from nested_attention.prompts import placeholders, slot_names
from nested_attention.provenance import Provenance, SubjectNote
from nested_attention.subjects import EncodedImage
from nested_attention.tracing import Trace
from nested_attention.ui.session import Result, Session, Slot, result_of

JOINING = {"in", "on", "at", "under", "by", "with", "wearing", "among", "near", "next", "smiling", "and"}


class Studio:
    """The app's models and visitors. Safe to call from many threads; visitors share nothing but the weights.

    `pipe` is what everybody starts with; `adapter` is the one that was named to load it, None for those of the base. One
    other model is kept beside it; the next one takes its place, and whoever still works with the old one keeps it until the
    end of the session.
    """

    def __init__(self, pipe: NestedAttentionPipeline, adapter: str | None = None):
        self.pipe, self.adapter = pipe, adapter
        self._other: tuple[tuple[str, str | None], NestedAttentionPipeline] | None = None
        self._sessions: dict[str, Session] = {}
        self._lock, self._loading = Lock(), Lock()

    def choose_model(self, session: Session, base: str, adapter: str | None) -> NestedAttentionPipeline:
        """Gives the session another model, loaded (and fetched) first if need be. Its subjects are forgotten.

        Raises:
            NestedAttentionError: the model or the adapter cannot be had. If that is found while loading, the session has the
                first model from then on.
        """
        with self._loading:
            if (base, adapter) == (self.pipe.base.name, self.adapter):
                chosen = self.pipe
            elif self._other is not None and self._other[0] == (base, adapter):
                chosen = self._other[1]
            else:
                base_folder(find_base(base))  # what cannot be had changes nothing
                session.turn_to(self.pipe)  # two large models at once would not fit into most GPUs
                self._other = None
                gc.collect()
                chosen = NestedAttentionPipeline.from_pretrained(base, adapter, self.pipe.device)
                self._other = (base, adapter), chosen
        session.turn_to(chosen)
        return chosen

    def session(self, key: str) -> Session:
        """The session of one visitor; others that were not used for long are dropped."""
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = Session(self.pipe)
            session = self._sessions[key]
            session.use()
            self._sessions = {name: one for name, one in self._sessions.items() if not one.over}
            return session

    def close(self, key: str) -> None:
        """A visitor's line is down: what is being drawn ends, and the session soon, unless they come back."""
        with self._lock:
            if key in self._sessions:
                self._sessions[key].leave()

    def encode(
        self, session: Session, slot: Slot, placeholder: str | None = None, framed: Sequence[Framed] | None = None, **knobs: Any
    ) -> Subject:
        """Encodes the pictures of one subject and remembers it under its placeholder. `framed`: they, if that was done already.

        Raises:
            NestedAttentionError: the slot has no picture, one cannot be used, or a value is out of its range.
        """
        pictures = [made.image for made in (framed_pictures(slot) if framed is None else framed)]
        subject = session.pipe.encode(slot.kind, pictures, placeholder, slot.strength, cache=session.cache, **knobs)
        session.subjects[subject.placeholder] = subject
        for image, file in zip(subject.images, slot.files, strict=True):
            session.sources[picture_hash(image)] = replace(slot, files=(file,))
        return subject

    def subjects_of_slots(self, session: Session, slots: Sequence[Slot], **knobs: Any) -> list[Subject]:
        """The subjects of all slots that hold a picture.

        Raises:
            NestedAttentionError: as of `encode`.
        """
        return [self.encode(session, slot, name, **knobs) for name, slot in named_slots(slots).items()]

    def generate(self, session: Session, prompt: str, subjects: Sequence[Subject], **settings: Any) -> Iterator[Progress | Result]:
        """Progress after every step, then the result, which the session keeps.

        Raises:
            NestedAttentionError: the prompt or a setting cannot be used, memory ran out, or the pictures cannot be saved.
        """
        maps, pipe = Trace(), session.pipe
        stream = pipe.stream(prompt, subjects, maps=maps, **settings)
        try:
            for event in stream:
                if isinstance(event, Progress):
                    yield event
                else:
                    session.result = self._keep(session, pipe, event, tuple(subjects), maps)
                    yield session.result
        finally:
            stream.close()

    def without_subjects(self, session: Session) -> Iterator[Progress | Image.Image]:
        """The first picture of the last result once more, its subjects as ordinary words: progress, then the picture.

        Raises:
            NestedAttentionError: nothing was generated yet, or memory ran out.
        """
        result = result_of(session)
        ordinary = [subject.but(strength=0.0) for subject in result.subjects]
        settings = result.generation.settings.as_dict() | {"num_images": 1}
        stream = session.pipe.stream(settings.pop("prompt"), ordinary, **settings)
        try:
            for event in stream:
                yield event if isinstance(event, Progress) else event.images[0]
        finally:
            stream.close()

    def _keep(
        self, session: Session, pipe: NestedAttentionPipeline, generation: Generation, subjects: tuple[Subject, ...], maps: Trace
    ) -> Result:
        files = []
        for image, made in zip(generation.images, provenances(pipe, generation, subjects, session.sources), strict=True):
            path = Path(session.folder.name) / f"{time.time_ns()}-seed{made.settings.seed}.png"
            made.save(image, path)
            files.append(str(path))
        return Result(generation, subjects, maps, tuple(files))


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


def framed_pictures(slot: Slot) -> list[Framed]:
    """The pictures of a slot as the adapter gets to see them, and what was done to each.

    Raises:
        NestedAttentionError: a picture or the crop cannot be used.
    """
    return [frame(read_image(file), slot.kind, slot.framing, slot.crop) for file in slot.files]


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
