"""What happens on the page when somebody presses something. Problems are said where they occur; nothing is cleared."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from nested_attention import NestedAttentionError, Progress, Subject
from nested_attention.prompts import PLACEHOLDER
from nested_attention.provenance import Provenance, read_provenance
from nested_attention.settings import MAX_SEED, MAX_SUBJECTS
from nested_attention.ui.examples import Example, example_sources
from nested_attention.ui.explain import enlarged
from nested_attention.ui.gpu import on_gpu
from nested_attention.ui.inside import reset
from nested_attention.ui.slots import VALUES, framing_of, no_adapter_for, read_slots, slot_updates
from nested_attention.ui.studio import Result, Session, Slot, Studio, missing_placeholders, put_into_prompt, result_of, slot_names

PREVIEW_EVERY = 3  # steps between two previews
CONTROLS = 9  # how many values of `Controls.inputs` come before those of the slots
EXAMPLE = "A finished example; press Generate to draw it here."
ORDINARY = {
    "person": ("a person", "a man", "a woman", "someone", "person"),
    "cat": ("a cat", "a kitten", "cat"),
    "vehicle": ("a vehicle", "a car", "vehicle"),
}


def insert_one(prompt: str, button: str, kind: str) -> str:
    """Writes the placeholder that a slot's button names into the prompt."""
    placeholder = next((word for word in button.split() if word.startswith("<")), "")
    return prompt if not placeholder or placeholder in prompt else put_into_prompt(prompt, placeholder, ORDINARY.get(kind, (kind,)))


class Handlers:
    """The event handlers of one page."""

    def __init__(self, studio: Studio, examples: Sequence[Example]):
        self.studio, self.examples = studio, examples
        self.shipped = example_sources(examples)
        self.generate = on_gpu(self._generate)
        self.compare = on_gpu(self._compare)

    def _session(self, request: gr.Request) -> Session:
        return self.studio.session(str(request.session_hash))

    def _generate(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        """Yields values for gallery, status, notice, offer and seed."""
        session = self._session(request)
        prompt, negative, num_images, steps, guidance, seed, new_seed, lam, token_weight = values[:CONTROLS]
        seed = random.randrange(MAX_SEED) if new_seed or seed is None else seed
        quiet = (gr.skip(), gr.skip(), "", gr.Button(visible=False), gr.skip())
        yield (gr.skip(), "Looking at the subjects …", *quiet[2:])
        try:
            subjects = self.studio.subjects_of_slots(session, read_slots(values[CONTROLS:]), lam=lam, token_weight=token_weight)
            if missing := missing_placeholders(prompt, subjects):
                yield (gr.skip(), "", *offer_to_insert(missing), gr.skip())
                return
            for event in self.studio.generate(
                session, prompt, subjects, negative_prompt=negative, num_images=num_images, steps=steps, guidance_scale=guidance, seed=seed,
            ):  # fmt: skip
                if isinstance(event, Progress):
                    pictures: Any = gr.skip()
                    if event.step % PREVIEW_EVERY == 1:
                        pictures, session.previewing = [enlarged(image) for image in event.previews()], True
                    yield (pictures, f"Step {event.step} of {event.steps}", *quiet[2:])
                else:
                    session.previewing = False
                    yield (list(event.files), finished(event), "", gr.Button(visible=False), event.generation.settings.seed)
        except NestedAttentionError as error:
            yield (self._unfinished(session), "", warned(error), gr.Button(visible=False), gr.skip())

    def _unfinished(self, session: Session) -> Any:
        """What the gallery goes back to where a run ends too early: the last finished pictures in place of half-denoised ones."""
        if not session.previewing:
            return gr.skip()
        session.previewing = False
        return list(session.result.files) if session.result else []

    def cancelled(self, request: gr.Request) -> tuple[Any, str]:
        """Values for gallery and status."""
        return self._unfinished(self._session(request)), "Cancelled."

    def look_inside(self, request: gr.Request) -> list:
        return reset(self.studio, str(request.session_hash))

    def insert_missing(self, request: gr.Request, *values: Any) -> tuple:
        """Puts every forgotten placeholder into the prompt."""
        prompt, slots = values[0], read_slots(values[1:])
        try:
            for subject in missing_placeholders(prompt, self.studio.subjects_of_slots(self._session(request), slots)):
                prompt = put_into_prompt(prompt, subject.placeholder, ORDINARY.get(subject.kind, (subject.kind,)))
        except NestedAttentionError as error:
            return gr.skip(), warned(error), gr.skip()
        return prompt, "Done; press Generate.", gr.Button(visible=False)

    def _compare(self, request: gr.Request) -> tuple[Image.Image, Image.Image]:
        session = self._session(request)
        try:
            return enlarged(self.studio.without_subjects(session)), enlarged(result_of(session).generation.images[0])
        except NestedAttentionError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def restore(self, path: str | None, request: gr.Request) -> list:
        """Values for controls, slots, which of them are open, and the notice, from a dropped PNG."""
        nothing = [gr.skip()] * (CONTROLS + VALUES * MAX_SUBJECTS + 1)
        if path is None:
            return [*nothing, ""]
        try:
            made = read_provenance(path)
        except NestedAttentionError as error:
            return [*nothing, warned(error)]
        session = self._session(request)
        prompt, slots, told = restored(made, session, self.shipped | session.sources)
        settings = made.settings
        knobs = (made.subjects[0].lam, made.subjects[0].token_weight) if made.subjects else (gr.skip(), gr.skip())
        controls = [
            prompt, settings.negative_prompt, settings.num_images, settings.steps, settings.guidance_scale, settings.seed, False, *knobs,
        ]  # fmt: skip
        return [*controls, *slot_updates(slots), told]

    def pick(self, event: gr.SelectData, request: gr.Request) -> list:
        """Fills in an example: prompt, seed, gallery, status, slots, and which slots are open."""
        example, pipe = self.examples[event.index], self._session(request).pipe
        known = [slot for slot in example.slots if slot.kind in pipe.kinds]
        unknown = [f"⚠️ {no_adapter_for(pipe, slot.kind)}" for slot in example.slots if slot not in known]
        return [example.prompt, example.seed, list(example.results), " ".join([EXAMPLE, *unknown]), *slot_updates(known)]

    def close(self, request: gr.Request) -> None:
        self.studio.close(str(request.session_hash))


def restored(made: Provenance, session: Session, sources: Mapping[str, Slot]) -> tuple[str, list[Slot], str]:
    """The prompt, the slots and what to say of a picture that was `made` anywhere.

    Slots have no names of their own, so a placeholder such as `<ada>` becomes that of its slot.
    """
    known = [note for note in made.subjects if note.kind in session.pipe.kinds]
    names = dict(zip((note.placeholder for note in known), slot_names([note.kind for note in known]), strict=True))
    slots, lost, told = [], [], ["Settings restored."]
    for note in known:
        found = [sources[picture] for picture in note.pictures if picture in sources]
        if found and len(found) == len(note.pictures):
            files = tuple(slot.files[0] for slot in found)
            slots.append(Slot(note.kind, files, note.strength, found[0].framing, found[0].crop))
        else:
            slots.append(Slot(note.kind, (), note.strength, framing_of(session.pipe, note.kind)))
            lost.append(names[note.placeholder])
    if made.base != session.pipe.base.name:
        told.append(f"⚠️ It was made with {made.base}; {session.pipe.base.name}, which is in use, draws another picture.")
    told += [f"⚠️ {no_adapter_for(session.pipe, note.kind)}" for note in made.subjects if note not in known]
    if lost:
        told.append(f"Add the pictures of `{', '.join(lost)}` again: a PNG does not carry them.")
    return PLACEHOLDER.sub(lambda match: names.get(match.group().lower(), match.group()), made.settings.prompt), slots, " ".join(told)


def warned(error: NestedAttentionError) -> str:
    """The message as Markdown in which placeholders stay visible."""
    return "⚠️ " + PLACEHOLDER.sub(lambda match: f"`{match.group()}`", str(error))


def offer_to_insert(missing: Sequence[Subject]) -> tuple[str, gr.Button]:
    names = " and ".join(subject.placeholder for subject in missing)
    return f"⚠️ The prompt does not say where `{names}` should be.", gr.Button(f"Put {names} into the prompt", visible=True)


def finished(result: Result) -> str:
    settings = result.generation.settings
    last = f"–{settings.seed + settings.num_images - 1}" if settings.num_images > 1 else ""
    return f"Done. Seed {settings.seed}{last}, {settings.steps} steps, guidance {settings.guidance_scale:g}."
