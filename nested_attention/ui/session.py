"""What one visitor has here: filled slots, encoded pictures, what is being drawn, the last result."""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image

from nested_attention import Generation, NestedAttentionError, NestedAttentionPipeline, Subject, SubjectCache
from nested_attention.faces import Box, Face, find_faces, insightface_ready
from nested_attention.prompts import placeholders
from nested_attention.provenance import UNCUT
from nested_attention.tracing import SubjectMaps, Trace

SESSION_SECONDS = 3600.0
LEFT_SECONDS = 300.0  # a phone that slept or changed its network is back by then
KEPT_SUBJECTS, KEPT_SEARCHES = 8, 64  # of a session
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Slot:
    """One subject slot as the user filled it: kind, picture files, strength, how to frame them (`faces.frame`)."""

    kind: str
    files: tuple[str, ...]
    strength: float = 1.0
    framing: str = "whole"
    crop: Box = UNCUT


@dataclass(frozen=True)
class Result:
    """A finished generation of a session: files of the pictures, what was traced, who was in it, and the model that drew it."""

    pipe: NestedAttentionPipeline
    generation: Generation
    subjects: tuple[Subject, ...]
    maps: Trace
    files: tuple[str, ...]

    def maps_of(self, placeholder: str | None) -> SubjectMaps:
        """What was traced of one of its subjects.

        Raises:
            NestedAttentionError: there is no such subject.
        """
        names = [subject.placeholder for subject in self.subjects]
        if not names:
            raise NestedAttentionError(
                "the last pictures were drawn without a subject; write a placeholder into the prompt and draw again."
            )
        if placeholder not in names:
            raise NestedAttentionError(f"{placeholder} is not in the last pictures; choose one of {', '.join(names)}.")
        return self.maps.subject(str(placeholder))


def new_cache() -> SubjectCache:
    """For the encoded pictures of one visitor, half a gigabyte at most."""
    return SubjectCache(512 << 20)


def keep_last(kept: dict[Key, Value], key: Key, value: Value, most: int) -> None:
    """Writes into `kept`, whose oldest entries go beyond `most`."""
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > most:
        kept.pop(next(iter(kept)), None)  # another thread may have been as quick


@dataclass(eq=False)
class Run:
    """Something that is being drawn for a visitor.

    `stopped`: nobody wants it any more. `last`: the status that it then leaves on the page, if that is still there. The run says
    it itself, as its last word: steps that are on their way would come after what anybody else says.
    """

    stopped: bool = False
    last: str | None = None


@dataclass
class Session:
    """Gone an hour after its last use, or soon after its visitor.

    `lost`: the name of the model that its page shows, where another one had to take its place. `subjects`: by placeholder, those
    that a client encoded last. `sources`: hash of what an encoder saw -> a slot with the one picture it was made of, framed in the
    same way. `searches`: the faces of pictures. `runs`: what is being drawn and did not say its end yet. `shown`: files of the
    finished pictures that the gallery shows, None as the page opened. `previewing`: it shows half-denoised ones instead.
    `compared`: files of those whose first the slider shows.
    """

    pipe: NestedAttentionPipeline
    lost: str | None = None
    cache: SubjectCache = field(default_factory=new_cache)
    subjects: dict[str, Subject] = field(default_factory=dict)
    sources: dict[str, Slot] = field(default_factory=dict)
    searches: dict[tuple[str, str, bool], list[Face]] = field(default_factory=dict)
    result: Result | None = None
    runs: list[Run] = field(default_factory=list)
    shown: Sequence[str] | None = None
    previewing: bool = False
    compared: Sequence[str] = ()
    folder: tempfile.TemporaryDirectory = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="nested-attention-"))
    ends: float = 0.0

    def use(self) -> None:
        """Puts off the end."""
        self.ends = time.monotonic() + SESSION_SECONDS

    @property
    def over(self) -> bool:
        """Nobody used it for long, and nothing is being drawn."""
        return time.monotonic() > self.ends and all(run.stopped for run in self.runs)

    def turn_to(self, pipe: NestedAttentionPipeline) -> None:
        """Goes on with another model; what was encoded and drawn with the one before is forgotten."""
        self.lost = None
        if pipe is not self.pipe:
            self.pipe, self.result, self.subjects, self.cache = pipe, None, {}, new_cache()

    def tell_lost(self) -> None:
        """Says once that the model of the page is not the one in use.

        Raises:
            NestedAttentionError: it is not.
        """
        if self.lost is not None:
            name, self.lost = self.lost, None
            raise NestedAttentionError(
                f"{name} had to go while you were away, and {self.pipe.base.name} is in use again; choose {name} once more under "
                f"“Model”, or press Generate again to draw with {self.pipe.base.name}."
            )

    def faces(self, image: Image.Image, kind: str) -> list[Face]:
        """`find_faces`, which takes seconds, once for each picture."""
        key = *SubjectCache.key(image, kind), insightface_ready()
        found = self.searches.get(key)
        if found is None:
            found = find_faces(image, kind)
        keep_last(self.searches, key, found, KEPT_SEARCHES)
        return found

    def remember(self, subject: Subject) -> None:
        """Keeps a subject for later requests of the same client."""
        keep_last(self.subjects, subject.placeholder, subject, KEPT_SUBJECTS)

    def named(self, prompt: str) -> list[Subject]:
        """The remembered subjects that a prompt names.

        Raises:
            NestedAttentionError: one is not there, or not any more.
        """
        names = placeholders(prompt)
        if missing := [name for name in names if name not in self.subjects]:
            raise NestedAttentionError(
                f"the prompt names {', '.join(missing)}, but no such subject is kept; encode it again (the last {KEPT_SUBJECTS} are "
                "kept), or take the word out."
            )
        return [self.subjects[name] for name in names]

    @contextmanager
    def running(self) -> Iterator[Run]:
        """Something is being drawn inside the block, unless `stop` or `end` say otherwise."""
        self.runs.append(run := Run())
        try:
            yield run
        finally:
            self.end(run)

    def end(self, run: Run) -> bool:
        """A run is through; false if it was stopped before."""
        wanted = run in self.runs
        if wanted:
            self.runs.remove(run)
        return wanted

    def until_stopped(self, run: Run, events: Iterable[Value]) -> Iterator[Value]:
        """The events of a run."""
        for event in events:
            self.use()
            if run.stopped:
                return
            yield event

    def stop(self, last: str) -> bool:
        """Ends all that is being drawn, after the step that it is at, with this status; false if there was nothing."""
        runs, self.runs = self.runs, []
        for run in runs:
            run.last, run.stopped = last, True
        return bool(runs)

    def leave(self) -> None:
        """The visitor went, it seems."""
        for run in self.runs:
            run.stopped = True
        self.ends = min(self.ends, time.monotonic() + LEFT_SECONDS)


def result_of(session: Session) -> Result:
    """The session's last result.

    Raises:
        NestedAttentionError: nothing was generated yet, or too long ago.
    """
    if session.result is None:
        raise NestedAttentionError("there is no picture to look into yet; press Generate first.")
    return session.result
