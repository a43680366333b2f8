"""What one visitor has here: filled slots, encoded pictures, what is being drawn, the last result."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event

from nested_attention import Generation, NestedAttentionError, NestedAttentionPipeline, Subject, SubjectCache
from nested_attention.faces import Box
from nested_attention.provenance import UNCUT
from nested_attention.tracing import SubjectMaps, Trace

SESSION_SECONDS = 3600.0
LEFT_SECONDS = 300.0  # a phone that slept or changed its network is back by then
DELIVERY_SECONDS = 5.0  # a visitor whose line is dead is not waited for


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
    """A finished generation of a session: files of the pictures, what was traced, and who was in it."""

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


class Run:
    """Something that is being drawn for a visitor.

    `stopped`: nobody wants it any more. `delivered`: nothing of it is on its way to the page.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.delivered = Event()
        self.delivered.set()


@dataclass
class Session:
    """Gone an hour after its last use, or soon after its visitor.

    `sources`: hash of what an encoder saw -> a slot with the one picture it was made of, framed in the same way.
    `runs`: what is being drawn and did not say its end yet. `shown`: files of the finished pictures that the gallery shows, None
    as the page opened. `previewing`: it shows half-denoised ones instead. `compared`: files of those whose first the slider shows.
    """

    pipe: NestedAttentionPipeline
    cache: SubjectCache = field(default_factory=new_cache)
    subjects: dict[str, Subject] = field(default_factory=dict)
    sources: dict[str, Slot] = field(default_factory=dict)
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
        if pipe is not self.pipe:
            self.pipe, self.result, self.subjects, self.cache = pipe, None, {}, new_cache()

    def begin(self) -> Run:
        """Something is being drawn from now on, until `end` or `stop`."""
        self.runs.append(run := Run())
        return run

    def end(self, run: Run) -> None:
        """A run says its end itself; one that was stopped has none to say."""
        if run in self.runs:
            self.runs.remove(run)

    @contextmanager
    def delivering(self, run: Run) -> Iterator[bool]:
        """Around a `yield` to the page; gives whether it is still wanted.

        The page has it when the next value is asked for, and `stop` waits for that, so that what it says comes after.
        """
        run.delivered.clear()
        self.use()
        try:
            yield not run.stopped
        except GeneratorExit:  # the page went, or cancelled, while it was on its way
            run.stopped = True
            raise
        finally:
            run.delivered.set()

    def stop(self) -> bool:
        """Ends all that is being drawn, after which it brings nothing to the page any more; false if there was nothing."""
        runs, self.runs = self.runs, []
        for run in runs:
            run.stopped = True
        for run in runs:
            run.delivered.wait(DELIVERY_SECONDS)
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
