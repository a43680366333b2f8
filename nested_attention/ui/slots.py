"""Up to four subject slots: kind, pictures, what the encoder will see of them, strength."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image

from nested_attention import NestedAttentionError, NestedAttentionPipeline
from nested_attention.faces import SEARCHES, Face, find_faces
from nested_attention.images import padded_square
from nested_attention.prompts import slot_names
from nested_attention.settings import MAX_SUBJECTS, check_pictures
from nested_attention.subjects import MAX_STRENGTH
from nested_attention.ui.session import Session, Slot
from nested_attention.ui.studio import Studio, framed_pictures

SIDES = {"Left": 0, "Top": 0, "Right": 100, "Bottom": 100}  # the crop that cuts nothing, in percent
EMPTY = "Add a picture first"


@dataclass(frozen=True)
class SlotPanel:
    """The components of one slot."""

    group: gr.Group
    kind: gr.Dropdown
    files: gr.Gallery
    preview: gr.Gallery
    strength: gr.Slider
    framing: gr.Dropdown
    crop: gr.Row
    sides: list[gr.Slider]
    note: gr.Markdown
    insert: gr.Button
    remove: gr.Button

    @property
    def inputs(self) -> list[gr.components.Component]:
        """What makes a `Slot`, in the order of `slot_of`."""
        return [self.kind, self.files, self.strength, self.framing, *self.sides]

    @property
    def drawn(self) -> list[gr.blocks.Block]:
        """In the order of what `look` returns."""
        return [self.preview, self.note, self.crop, self.framing]


VALUES = 4 + len(SIDES)  # of one panel's `inputs`


def slot_of(values: Sequence[Any]) -> Slot:
    """A slot from the values of a panel's `inputs`."""
    kind, files, strength, framing, *sides = values
    left, top, right, bottom = (side / 100 for side in sides)
    return Slot(kind, tuple(path for path, _ in files or ()), strength, framing, (left, top, right, bottom))


def read_slots(values: Sequence[Any]) -> list[Slot]:
    """The slots from the flat values of all panels' `inputs`."""
    return [slot_of(values[start : start + VALUES]) for start in range(0, len(values), VALUES)]


def panel_values(slot: Slot) -> list:
    """Values for one panel's `inputs`."""
    framing = gr.Dropdown(framings(slot.kind, face_number(slot.framing)), value=slot.framing)
    return [slot.kind or None, list(slot.files) or None, slot.strength, framing, *(round(100 * side) for side in slot.crop)]


def slot_updates(pipe: NestedAttentionPipeline, slots: Sequence[Slot]) -> list:
    """Values for all panels' `inputs`, then the numbers of the slots to open: the given slots first, the rest as on a fresh page."""
    return [*(value for slot in first_slots(pipe, slots) for value in panel_values(slot)), opened_for(slots)]


def opened_for(slots: Sequence[Slot]) -> list[int]:
    """The numbers of the slots that are open where `slots` fill the first ones."""
    return list(range(max(1, len(slots))))


def slot_labels(slots: Sequence[Slot]) -> list[str]:
    """How every slot's button reads, and the line below the prompt: only slots with a picture have a placeholder."""
    filled = [number for number, slot in enumerate(slots) if slot.files]
    names = dict(zip(filled, slot_names([slots[number].kind for number in filled]), strict=True))
    buttons = [f"Put {names[number]} into the prompt" if number in names else EMPTY for number in range(len(slots))]
    known = " · ".join(f"`{name}` {slots[number].kind}, subject {number + 1}" for number, name in names.items())
    return [*buttons, f"Placeholders: {known}" if known else "No subject has a picture yet, so there is no placeholder to write."]


def face_number(framing: str) -> int:
    """Which face by size a framing means: 2 for "face 2"; 1 where it means none."""
    return int(framing.removeprefix("face") or 1) if framing.startswith("face") else 1


def framings(kind: str, faces: int) -> list[tuple[str, str]]:
    """Ways to use a picture: whole, cropped, or by one of the `faces` that were found.

    The largest face can be chosen before anybody looked for it: looking takes time, so it is done when asked for.
    """
    of_faces = [("largest face", "face"), *((f"face {n} by size", f"face {n}") for n in range(2, faces + 1))]
    return [("whole picture", "whole"), ("own crop", "crop"), *(of_faces if kind in SEARCHES else [])]


@dataclass(frozen=True)
class Seen:
    """What the encoder will see of a slot's pictures, how they were framed or why one cannot be used, and how many faces there are."""

    pictures: list[Image.Image]
    note: str
    faces: int


def seen(pipe: NestedAttentionPipeline, slot: Slot, find: Callable[[Image.Image, str], list[Face]] = find_faces) -> Seen:
    """Frames the pictures of a slot as they will be encoded; a problem is said in the note. `find`: as of `faces.frame`."""
    if slot.files and slot.kind not in pipe.adapters:
        return Seen([], f"⚠️ {no_adapter_for(pipe, slot.kind)}", 0)
    try:
        check_pictures(slot.kind, len(slot.files))
    except NestedAttentionError as error:
        return Seen([], f"⚠️ {error}", 0)
    pictures, notes, faces = [], [], 0
    for file in slot.files:
        try:
            (made,) = framed_pictures(replace(slot, files=(file,)), find)
            pictures.append(padded_square(made.image, pipe.adapters[slot.kind].config.image.size))
            notes.append(made.said)
            faces = max(faces, made.faces)
        except NestedAttentionError as error:
            notes.append(f"⚠️ {error}")
    return Seen(pictures, "\n\n".join(dict.fromkeys(notes)), faces)


def look(session: Session, slot: Slot) -> tuple[gr.Gallery, str, gr.Row, gr.Dropdown]:
    """Values for a slot's preview, note, row of crop sliders and framing, which stays as it is unless that face is not there."""
    pipe = session.pipe
    found = seen(pipe, slot, session.faces)
    ways = framings(slot.kind, found.faces)
    there = slot.framing in [way for _, way in ways]
    framing = gr.Dropdown(ways) if there else gr.Dropdown(ways, value=framing_of(pipe, slot.kind))
    return gr.Gallery(found.pictures), found.note, gr.Row(visible=slot.framing == "crop"), framing


def framing_of(pipe: NestedAttentionPipeline, kind: str) -> str:
    """The framing that the kind's adapter was trained with; of kinds whose faces nobody can find it is the whole picture."""
    return pipe.adapters[kind].config.framing if kind in pipe.adapters and kind in SEARCHES else "whole"


def no_adapter_for(pipe: NestedAttentionPipeline, kind: str) -> str:
    """The sentence for a kind that the model does not know."""
    return f"{pipe.base.name} has no adapter for {kind or 'subjects'} here; choose another kind, or a model that has one."


def build_slot(pipe: NestedAttentionPipeline, number: int, slot: Slot, is_open: bool, label: str) -> SlotPanel:
    """One slot, filled with `slot` from the start; `label` of its button."""
    found = seen(pipe, slot)
    with gr.Group(visible=is_open, elem_classes="slot") as group:
        with gr.Row():
            kind = gr.Dropdown(
                list(pipe.kinds), value=slot.kind or None, label=f"Subject {number + 1}", scale=2, min_width=100, elem_id=f"kind-{number}"
            )
            framing = gr.Dropdown(
                framings(slot.kind, found.faces), value=slot.framing, label="Of its pictures", scale=3, min_width=130,
                elem_id=f"framing-{number}",
            )  # fmt: skip
            strength = gr.Slider(
                0, MAX_STRENGTH, slot.strength, step=0.05, label="Strength", info="0 is an ordinary word", scale=3, min_width=150
            )
        with gr.Row():
            with gr.Column(scale=3, min_width=180):
                gr.Markdown("Its pictures: upload or paste one or several", elem_classes="caption")
                files = gr.Gallery(
                    list(slot.files) or None, show_label=False, type="filepath", columns=3, height=120, fit_columns=False, interactive=True,
                    sources=["upload", "clipboard"], object_fit="contain", elem_id=f"files-{number}",
                )  # fmt: skip
            with gr.Column(scale=2, min_width=120):
                gr.Markdown("What the encoder sees", elem_classes="caption")
                preview = gr.Gallery(
                    found.pictures, show_label=False, columns=2, height=120, interactive=False, allow_preview=False, object_fit="contain",
                    fit_columns=False, buttons=[], elem_id=f"seen-{number}",
                )  # fmt: skip
        with gr.Row(visible=False) as crop:
            sides = [gr.Slider(0, 100, value, step=1, label=f"{side} %", min_width=140) for side, value in SIDES.items()]
        note = gr.Markdown(found.note, elem_classes="notice", elem_id=f"note-{number}")
        with gr.Row():
            insert = gr.Button(label, size="sm", interactive=label != EMPTY, min_width=120, elem_id=f"insert-{number}")
            remove = gr.Button("Remove", size="sm", min_width=60, elem_id=f"remove-{number}")
    return SlotPanel(group, kind, files, preview, strength, framing, crop, sides, note, insert, remove)


@dataclass(frozen=True)
class Slots:
    """All slots.

    `opened`: the numbers of those that are shown; `names`: the line with their placeholders, not yet on the page; `redraw`: values
    for `drawn` from those of `inputs`. What the app itself writes into a slot is not reliably reported as a change by the
    browser, least of all in closed slots, and into `opened` not at all from outside the queue, so `follow` says it.
    """

    panels: list[SlotPanel]
    more: gr.Button
    opened: gr.State
    names: gr.Markdown
    no_adapter: gr.Markdown
    redraw: Callable[..., list]

    @property
    def inputs(self) -> list[gr.components.Component]:
        """Of all panels, for `read_slots`."""
        return [component for panel in self.panels for component in panel.inputs]

    @property
    def labels(self) -> list[gr.components.Component]:
        """In the order of `slot_labels`."""
        return [*(panel.insert for panel in self.panels), self.names]

    @property
    def drawn(self) -> list[gr.blocks.Block]:
        """What follows from the values of `inputs`."""
        return [*(block for panel in self.panels for block in panel.drawn), *self.labels]

    @property
    def shown(self) -> list[gr.blocks.Block]:
        """In the order of `shown_groups`."""
        return [*(panel.group for panel in self.panels), self.more]

    def follow(self, filled: gr.events.Dependency) -> None:
        """Shows what an event of the app wrote into the slots and into `opened`."""
        filled.then(shown_groups, self.opened, self.shown, queue=False, api_visibility="private")
        filled.then(self.redraw, self.inputs, self.drawn, queue=False, api_visibility="private")


def first_slots(pipe: NestedAttentionPipeline, filled: Sequence[Slot]) -> list[Slot]:
    """What the slots hold at first: `filled`, and then empty ones of the kinds in turn."""
    kinds = [pipe.kinds[number % len(pipe.kinds)] if pipe.kinds else "" for number in range(len(filled), MAX_SUBJECTS)]
    return [*filled, *(empty_slot(pipe, kind) for kind in kinds)]


def empty_slot(pipe: NestedAttentionPipeline, kind: str) -> Slot:
    """A slot of a kind that waits for pictures."""
    return Slot(kind, (), framing=framing_of(pipe, kind))


def build_slots(studio: Studio, filled: Sequence[Slot]) -> Slots:
    """Four slots, `filled` in the first ones and those open; and the line that says so where a model has no adapter."""
    pipe = studio.pipe
    no_adapter = gr.Markdown("This model has no adapter here yet, so prompts go without subjects.", visible=not pipe.kinds)
    first = first_slots(pipe, filled)
    *buttons, named = slot_labels(first)
    shown = opened_for(filled)
    panels = [build_slot(pipe, k, slot, k in shown, label) for k, (slot, label) in enumerate(zip(first, buttons, strict=True))]
    more = gr.Button("+ another subject", size="sm", elem_id="more")

    def session_of(request: gr.Request) -> Session:
        return studio.session(str(request.session_hash))

    def looked(request: gr.Request, *values: Any) -> tuple[gr.Gallery, str, gr.Row, gr.Dropdown]:
        return look(session_of(request), slot_of(values))

    def reframed(kind: str, request: gr.Request) -> gr.Dropdown:
        return gr.Dropdown(framings(kind, 1), value=framing_of(session_of(request).pipe, kind))

    def labelled(*values: Any) -> list:
        *labels, line = slot_labels(read_slots(values))
        return [*(gr.Button(label, interactive=label != EMPTY) for label in labels), line]

    def redraw(request: gr.Request, *values: Any) -> list:
        session = session_of(request)
        return [*(value for slot in read_slots(values) for value in look(session, slot)), *labelled(*values)]

    def removed(number: int, kind: str | None, opened: list[int], request: gr.Request) -> list:
        return without(session_of(request).pipe, number, kind, opened)

    names = gr.Markdown(named, render=False, elem_classes="notice", elem_id="names")
    slots = Slots(panels, more, gr.State(shown), names, no_adapter, redraw)
    added = more.click(one_more, slots.opened, slots.opened, queue=False, api_visibility="private")
    added.then(shown_groups, slots.opened, slots.shown, queue=False, api_visibility="private")
    for number, panel in enumerate(panels):
        changes = [panel.files.change, panel.kind.change, panel.framing.change, *(side.release for side in panel.sides)]
        gr.on(changes, looked, panel.inputs, panel.drawn, queue=False, api_visibility="private")
        panel.kind.input(reframed, panel.kind, panel.framing, queue=False, api_visibility="private")
        gr.on([panel.files.change, panel.kind.change], labelled, slots.inputs, slots.labels, queue=False, api_visibility="private")
        emptied = panel.remove.click(
            removed, [gr.State(number), panel.kind, slots.opened], [*panel.inputs, slots.opened], queue=False, api_visibility="private"
        )
        slots.follow(emptied)
    return slots


def shown_groups(opened: list[int]) -> list[gr.Group | gr.Button]:
    """Which slots are visible, and whether another one can be opened."""
    return [*(gr.Group(visible=number in opened) for number in range(MAX_SUBJECTS)), gr.Button(visible=len(opened) < MAX_SUBJECTS)]


def one_more(opened: list[int]) -> list[int]:
    """Opens the first slot that is not."""
    return sorted([*opened, *[number for number in range(MAX_SUBJECTS) if number not in opened][:1]])


def without(pipe: NestedAttentionPipeline, number: int, kind: str | None, opened: list[int]) -> list:
    """Empties a slot and closes it, unless it is the only open one: values for its panel's `inputs`, and the slots that stay open."""
    return [*panel_values(empty_slot(pipe, kind or "")), [other for other in opened if other != number] or opened]
