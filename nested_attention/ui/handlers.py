"""What happens on the page when somebody presses something. Problems are said where they occur; nothing is cleared."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from nested_attention import NestedAttentionError, NestedAttentionPipeline, Progress
from nested_attention.prompts import PLACEHOLDER, placeholders, slot_names
from nested_attention.provenance import Provenance, SubjectNote, read_provenance
from nested_attention.settings import MAX_SUBJECTS, random_seed
from nested_attention.ui.controls import CONTROLS, PICTURES, knob_defaults
from nested_attention.ui.examples import Example, example_sources
from nested_attention.ui.explain import enlarged
from nested_attention.ui.gpu import on_gpu
from nested_attention.ui.inside import reset
from nested_attention.ui.session import Result, Session, Slot, result_of
from nested_attention.ui.slots import VALUES, empty_slot, face_number, framings, no_adapter_for, read_slots, slot_updates
from nested_attention.ui.studio import Studio, missing_placeholders, put_into_prompt

PREVIEW_EVERY = 3  # steps between two previews
WAITING = "Waiting for its turn …"
CANCELLING, CANCELLED = "Cancelling …", "Cancelled."
LOOKING = "Looking at the subjects …"
EXAMPLE = "A finished example; press Generate to draw it here."
ORDINARY = {
    "person": ("a person", "a man", "a woman", "someone", "person"),
    "cat": ("a cat", "a kitten", "cat"),
    "vehicle": ("a vehicle", "a car", "vehicle"),
}


def insert_one(prompt: str, button: str, kind: str) -> str:
    """Writes the placeholder that a slot's button names into the prompt."""
    placeholder = next((word for word in button.split() if word.startswith("<")), "")
    there = not placeholder or placeholder in placeholders(prompt)
    return prompt if there else put_into_prompt(prompt, placeholder, ORDINARY.get(kind, (kind,)))


def insert_missing(prompt: str, *values: Any) -> tuple[str, str, gr.Button]:
    """Writes every forgotten placeholder into the prompt; `values` of the slots. Then notice and offer."""
    for placeholder, kind in missing_placeholders(prompt, read_slots(values)).items():
        prompt = put_into_prompt(prompt, placeholder, ORDINARY.get(kind, (kind,)))
    return prompt, "Done; press Generate.", hidden()


class Handlers:
    """The event handlers of one page."""

    def __init__(self, studio: Studio, examples: Sequence[Example]):
        self.studio, self.examples = studio, examples
        self.start = next((example for example in examples if all(slot.kind in studio.pipe.kinds for slot in example.slots)), None)
        self.shipped = example_sources(examples)
        self.ours = {slot.kind: slot for example in reversed(examples) for slot in example.slots}  # of every kind the first
        self.our_files = {Path(file).read_bytes() for example in examples for slot in example.slots for file in slot.files}
        self.generate = on_gpu(self._generate)
        self.compare = on_gpu(self._compare)

    def _session(self, request: gr.Request) -> Session:
        return self.studio.session(str(request.session_hash))

    def _generate(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        """Yields values for gallery, status, notice, offer and seed."""
        session = self._session(request)
        prompt, negative, num_images, steps, guidance, seed, new_seed, lam, token_weight = values[:CONTROLS]
        new_seed = new_seed or seed is None
        seed = random_seed() if new_seed else seed
        quiet, slots = ("", hidden(), gr.skip()), read_slots(values[CONTROLS:])
        if missing := missing_placeholders(prompt, slots):
            yield (gr.skip(), "", *offer_to_insert(missing), gr.skip())
            return
        try:
            with session.running() as run:
                yield (gr.skip(), LOOKING, "", hidden(), seed if new_seed else gr.skip())
                session.tell_lost()
                pipe = session.pipe
                subjects = self.studio.subjects_of_slots(session, pipe, slots, lam=lam, token_weight=token_weight)
                for event in self.studio.generate(
                    session, run, pipe, prompt, subjects, negative_prompt=negative, num_images=num_images, steps=steps,
                    guidance_scale=guidance, seed=seed,
                ):  # fmt: skip
                    if isinstance(event, Progress):
                        pictures: Any = gr.skip()
                        if event.step % PREVIEW_EVERY == 1:
                            pictures, session.previewing = [enlarged(image) for image in event.previews()], True
                        yield (pictures, f"Step {event.step} of {event.steps}", *quiet)
                    else:
                        session.shown, session.previewing = event.files, False
                        yield (list(event.files), finished(event), *quiet)
                if run.last is not None:
                    session.previewing = False
                    yield (self._last_finished(session), run.last, *quiet)
        except NestedAttentionError as error:
            yield (self._unfinished(session), "", warned(error), hidden(), gr.skip())

    def _unfinished(self, session: Session) -> Any:
        """What the gallery goes back to where a run ends too early: the last finished pictures in place of half-denoised ones."""
        if not session.previewing:
            return gr.skip()
        session.previewing = False
        return self._last_finished(session)

    def _last_finished(self, session: Session) -> list[str]:
        return list((self.start.results if self.start else ()) if session.shown is None else session.shown)

    def cancel(self, status: str, request: gr.Request) -> tuple[Any, Any]:
        """Values for status, which was `status`, and for what has runs forgotten that wait for their turn.

        What is being drawn says itself that it is cancelled; nothing changes where nothing was under way.
        """
        stopped = self._session(request).stop(CANCELLED)
        return (CANCELLED, time.time()) if status == WAITING and not stopped else (gr.skip(), gr.skip())

    def failed(self, request: gr.Request) -> Any:
        """What the gallery goes back to where a run ended in an error that is no sentence of ours, or never began."""
        return self._unfinished(self._session(request))

    def look_inside(self, request: gr.Request) -> list:
        """Values for all of "Look inside", and for the slider, which goes with the pictures that it compares."""
        session = self._session(request)
        compared = session.result is not None and session.compared == session.result.files
        return [*reset(self.studio, str(request.session_hash)), gr.skip() if compared else None]

    def _compare(self, request: gr.Request) -> Iterator[tuple]:
        """Yields values for the slider, without and with the subjects, and status.

        Raises:
            gr.Error: there is nothing to compare with, or it could not be drawn.
        """
        session = self._session(request)
        try:
            result = result_of(session)
            with session.running() as run:
                for event in self.studio.without_subjects(session, run, result):
                    if isinstance(event, Progress):
                        yield gr.skip(), f"With ordinary words: step {event.step} of {event.steps}"
                    else:
                        session.compared = result.files
                        yield (enlarged(event), enlarged(result.generation.images[0])), finished(result)
                if run.last is not None:
                    yield gr.skip(), run.last
        except NestedAttentionError as error:
            yield gr.skip(), "" if session.result is None else finished(session.result)  # it does not wait any more
            raise gr.Error(str(error), print_exception=False) from error

    def restore(self, path: str | None, request: gr.Request) -> list:
        """Values for controls, slots, which of them are open, notice and offer, from a dropped PNG."""
        nothing = [gr.skip()] * (CONTROLS + VALUES * MAX_SUBJECTS + 1)
        if path is None:
            return [*nothing, "", hidden()]
        try:
            made = read_provenance(path)
        except NestedAttentionError as error:
            return [*nothing, warned(error), hidden()]
        session = self._session(request)
        pipe = session.pipe
        prompt, slots, told = restored(made, pipe, self.shipped | session.sources)
        settings = made.settings
        knobs = (made.subjects[0].lam, made.subjects[0].token_weight) if made.subjects else (gr.skip(), gr.skip())
        controls = [
            prompt, settings.negative_prompt, settings.num_images, settings.steps, settings.guidance_scale, settings.seed, False, *knobs,
        ]  # fmt: skip
        return [*controls, *slot_updates(pipe, slots), told, hidden()]

    def pick(self, event: gr.SelectData, request: gr.Request) -> list:
        """Fills in an example, which was drawn with the model's defaults: values as of `restore`, then gallery, status, and what has
        runs forgotten that wait for their turn.

        What was drawn before is forgotten, for the gallery no longer shows it, and what is being drawn ends.
        """
        example, session = self.examples[event.index], self._session(request)
        session.result, session.shown, session.previewing, pipe = None, example.results, False, session.pipe
        steps, guidance, negative, lam = knob_defaults(pipe)
        controls = [example.prompt, negative, PICTURES, steps, guidance, example.seed, False, lam, 1.0]
        known = [slot for slot in example.slots if slot.kind in pipe.kinds]
        unknown = [f"⚠️ {no_adapter_for(pipe, slot.kind)}" for slot in example.slots if slot not in known]
        status = " ".join([EXAMPLE, *unknown])
        forgotten = gr.skip() if session.stop(status) else time.time()
        return [*controls, *slot_updates(pipe, known), "", hidden(), list(example.results), status, forgotten]

    def ready_made(self, sample: list[str], request: gr.Request, *values: Any) -> list:
        """Writes a ready-made prompt and sees to the subjects that it names: values as of `restore`, from those of the slots.

        Somebody's own pictures stay. Those of examples come where a subject is missing, and go where the prompt names none.
        """
        pipe, (prompt,) = self._session(request).pipe, sample
        filled = [slot for slot in read_slots(values) if slot.files]
        chosen, told = [slot for slot in filled if not self._is_ours(slot)], []
        ours = self.ours | {slot.kind: slot for slot in filled if self._is_ours(slot)}
        for name in placeholders(prompt):
            kind = name[1:-1]
            if kind not in pipe.kinds:
                told.append(f"⚠️ {no_adapter_for(pipe, kind)}")
            elif name not in slot_names([slot.kind for slot in chosen]) and kind in ours and len(chosen) < MAX_SUBJECTS:
                chosen.append(ours[kind])
                if ours[kind] not in filled:
                    told.append(f"`{name}` is one of our examples; press Generate, or add pictures of your own.")
        return [prompt, *[gr.skip()] * (CONTROLS - 1), *slot_updates(pipe, chosen), " ".join(told), hidden()]

    def _is_ours(self, slot: Slot) -> bool:
        """Whether a slot shows an example's pictures. The page's files are copies, so it is their content that tells."""
        return all(Path(file).is_file() and Path(file).read_bytes() in self.our_files for file in slot.files)

    def close(self, request: gr.Request) -> None:
        """A visitor left, or lost the line."""
        self.studio.close(str(request.session_hash))


def restored(made: Provenance, pipe: NestedAttentionPipeline, sources: Mapping[str, Slot]) -> tuple[str, list[Slot], str]:
    """The prompt, the slots and what to say of a picture that was `made` anywhere.

    Slots have no names of their own, so a placeholder such as `<ada>` becomes that of its slot.
    """
    known = [note for note in made.subjects if note.kind in pipe.kinds]
    names = dict(zip((note.placeholder for note in known), slot_names([note.kind for note in known]), strict=True))
    slots, lost, told = [], [], ["Settings restored."]
    for note in known:
        found = [sources[picture] for picture in note.pictures if picture in sources]
        if found and len(found) == len(note.pictures):
            files = tuple(slot.files[0] for slot in found)
            slots.append(Slot(note.kind, files, note.strength, found[0].framing, found[0].crop))
        else:
            slots.append(waiting(note, pipe))
            lost.append(names[note.placeholder])
    if made.base != pipe.base.name:
        told.append(f"⚠️ It was made with {made.base}; {pipe.base.name}, which is in use, draws another picture.")
    elif others := dict.fromkeys(n.kind for n in known if n.adapter not in ("", pipe.adapters[n.kind].revision)):
        told.append(f"⚠️ It was made with another adapter for {' and '.join(others)}; the one in use draws another picture.")
    if len({(note.lam, note.token_weight) for note in known}) > 1:
        knobs = ", ".join(f"`{names[note.placeholder]}` {note.lam:g} and {note.token_weight:g}" for note in known)
        told.append(f"⚠️ Its subjects had λ and token weights of their own ({knobs}); on this page all have those of the first.")
    told += [f"⚠️ {no_adapter_for(pipe, note.kind)}" for note in made.subjects if note not in known]
    if lost:
        told.append(f"Add the pictures of `{', '.join(lost)}` again: a PNG does not carry them.")
    return PLACEHOLDER.sub(lambda match: names.get(match.group().lower(), match.group()), made.settings.prompt), slots, " ".join(told)


def waiting(note: SubjectNote, pipe: NestedAttentionPipeline) -> Slot:
    """A slot for pictures that have to be added again, to be framed as they were where their kind can be."""
    slot = replace(empty_slot(pipe, note.kind), strength=note.strength)
    known = note.framing in [way for _, way in framings(note.kind, face_number(note.framing))]
    return replace(slot, framing=note.framing, crop=note.crop) if known else slot


def hidden() -> gr.Button:
    """No offer."""
    return gr.Button(visible=False)


def warned(error: NestedAttentionError) -> str:
    """The message as Markdown in which placeholders stay visible."""
    return "⚠️ " + PLACEHOLDER.sub(lambda match: f"`{match.group()}`", str(error))


def offer_to_insert(missing: Iterable[str]) -> tuple[str, gr.Button]:
    """The notice about forgotten placeholders, and the button that writes them."""
    names = " and ".join(missing)
    return f"⚠️ The prompt does not say where `{names}` should be.", gr.Button(f"Put {names} into the prompt", visible=True)


def finished(result: Result) -> str:
    """The status after a generation: what repeats it."""
    settings = result.generation.settings
    last = f"–{settings.seed + settings.num_images - 1}" if settings.num_images > 1 else ""
    return f"Done. Seed {settings.seed}{last}, {settings.steps} steps, guidance {settings.guidance_scale:g}."
