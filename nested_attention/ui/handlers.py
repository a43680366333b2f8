"""What happens on the page when somebody presses something. Problems are said where they occur; nothing is cleared."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from nested_attention import NestedAttentionError, Progress, Subject
from nested_attention.prompts import PLACEHOLDER
from nested_attention.provenance import read_provenance
from nested_attention.settings import MAX_SEED, MAX_SUBJECTS
from nested_attention.ui.examples import Example
from nested_attention.ui.explain import enlarged
from nested_attention.ui.gpu import on_gpu
from nested_attention.ui.inside import reset
from nested_attention.ui.slots import VALUES, read_slots, slot_updates
from nested_attention.ui.studio import Result, Session, Studio, missing_placeholders, put_into_prompt, result_of

PREVIEW_EVERY = 3  # steps between two previews
CONTROLS = 9  # how many values of `Controls.inputs` come before those of the slots
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
                    pictures: Any = [enlarged(image) for image in event.previews()] if event.step % PREVIEW_EVERY == 1 else gr.skip()
                    yield (pictures, f"Step {event.step} of {event.steps}", *quiet[2:])
                else:
                    yield (list(event.files), finished(event), "", gr.Button(visible=False), event.generation.settings.seed)
        except NestedAttentionError as error:
            yield (gr.skip(), "", warned(error), gr.Button(visible=False), gr.skip())

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
        """Values for controls, slots and notice from a dropped PNG."""
        nothing = [gr.skip()] * (CONTROLS + VALUES * MAX_SUBJECTS)
        if path is None:
            return [*nothing, ""]
        try:
            made = read_provenance(path)
        except NestedAttentionError as error:
            return [*nothing, warned(error)]
        settings, sources = made.settings, self._session(request).sources
        knobs = (made.subjects[0].lam, made.subjects[0].token_weight) if made.subjects else (gr.skip(), gr.skip())
        controls = [
            settings.prompt, settings.negative_prompt, settings.num_images, settings.steps, settings.guidance_scale, settings.seed, False, *knobs,
        ]  # fmt: skip
        slots: list = []
        lost = [note.placeholder for note in made.subjects if not all(picture in sources for picture in note.pictures)]
        for number in range(MAX_SUBJECTS):
            note = made.subjects[number] if number < len(made.subjects) else None
            if note is None:
                slots += [gr.skip()] * VALUES
            else:
                files = [sources[picture] for picture in note.pictures if picture in sources]
                rest = [gr.skip()] * (VALUES - 3)
                slots += [note.kind, files if note.placeholder not in lost else gr.skip(), note.strength, *rest]
        told = (
            f"Settings restored. Add the pictures of `{', '.join(lost)}` again: a PNG does not carry them."
            if lost
            else "Settings restored."
        )
        return [*controls, *slots, told]

    def pick(self, event: gr.SelectData) -> list:
        """Fills in an example: prompt, seed, gallery, status, slots, and which slots are open."""
        example = self.examples[event.index]
        opened = [gr.Group(visible=number < max(1, len(example.slots))) for number in range(MAX_SUBJECTS)]
        return [
            example.prompt, example.seed, list(example.results), "A finished example; press Generate to draw it here.",
            *slot_updates(example.slots), *opened,
        ]  # fmt: skip

    def close(self, request: gr.Request) -> None:
        self.studio.close(str(request.session_hash))


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
