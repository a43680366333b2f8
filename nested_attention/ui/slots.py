"""Up to four subject slots: kind, pictures, what the encoder will see of them, strength."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nested_attention import NestedAttentionError, NestedAttentionPipeline
from nested_attention.images import padded_square
from nested_attention.settings import MAX_SUBJECTS
from nested_attention.subjects import MAX_STRENGTH
from nested_attention.ui.studio import Slot, Studio, framed_pictures, slot_names

FRAMINGS = {"the largest face": "face", "the second face": "face 2", "the third face": "face 3", "the fourth face": "face 4",
            "the fifth face": "face 5", "the sixth face": "face 6", "my own crop": "crop", "the whole picture": "whole"}  # fmt: skip
SIDES = {"Left": 0, "Top": 0, "Right": 100, "Bottom": 100}  # the crop that cuts nothing, in percent


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
        return [self.kind, self.files, self.strength, self.framing, *self.sides]


VALUES = 4 + len(SIDES)  # of one panel's `inputs`


def slot_of(values: Sequence[Any]) -> Slot:
    """A slot from the values of a panel's `inputs`."""
    kind, files, strength, framing, *sides = values
    left, top, right, bottom = (side / 100 for side in sides)
    return Slot(kind, tuple(path for path, _ in files or ()), strength, framing, (left, top, right, bottom))


def read_slots(values: Sequence[Any]) -> list[Slot]:
    """The slots from the flat values of all panels' `inputs`."""
    return [slot_of(values[start : start + VALUES]) for start in range(0, len(values), VALUES)]


def slot_updates(slots: Sequence[Slot]) -> list:
    """Values for all panels' `inputs`: the given slots first, the rest emptied."""
    values: list = []
    for number in range(MAX_SUBJECTS):
        if number < len(slots):
            slot = slots[number]
            values += [slot.kind, list(slot.files), slot.strength, slot.framing, *(round(100 * side) for side in slot.crop)]
        else:
            values += [gr.skip(), None, 1.0, gr.skip(), *SIDES.values()]
    return values


def slot_labels(values: Sequence[Any]) -> list[gr.Button]:
    """How every slot's button should read, given the values of all panels' `inputs`: only slots with a picture count."""
    slots = read_slots(values)
    filled = [slot.kind if slot.files else "" for slot in slots]
    names = iter(slot_names([kind for kind in filled if kind]))
    return [
        gr.Button(f"Put {next(names)} into the prompt", interactive=True) if kind else gr.Button("Add a picture first", interactive=False)
        for kind in filled
    ]


def look(pipe: NestedAttentionPipeline, slot: Slot) -> tuple[gr.Gallery, str, gr.Row]:
    """What the encoder will see of the pictures in a slot and how they were framed, or why one cannot be used."""
    pictures, notes = [], []
    for file in slot.files:
        try:
            (made,) = framed_pictures(Slot(slot.kind, (file,), framing=slot.framing, crop=slot.crop))
            pictures.append(padded_square(made.image, pipe.adapters[slot.kind].config.image.size))
            notes.append(made.said)
        except NestedAttentionError as error:
            notes.append(f"⚠️ {error}")
    told = [note for note in dict.fromkeys(notes) if slot.framing != "whole" or note.startswith("⚠️")]
    return gr.Gallery(pictures), "\n\n".join(told), gr.Row(visible=slot.framing == "crop")


def framing_for(pipe: NestedAttentionPipeline, kind: str) -> gr.Dropdown:
    """The framing that the kind's adapter was trained with; no choice where that is the whole picture."""
    framing = pipe.adapters[kind].config.framing if kind in pipe.adapters else "whole"
    return gr.Dropdown(list(FRAMINGS.items()), value=framing, visible=framing != "whole", label="Use of the picture")


def build_slot(pipe: NestedAttentionPipeline, number: int) -> SlotPanel:
    kinds = list(pipe.kinds)
    chosen = kinds[number % len(kinds)] if number < 2 and kinds else next(iter(kinds), None)
    with gr.Group(visible=number == 0, elem_classes="slot") as group:
        with gr.Row():
            kind = gr.Dropdown(kinds, value=chosen, label=f"Subject {number + 1}", min_width=110, elem_id=f"kind-{number}")
            strength = gr.Slider(
                0, MAX_STRENGTH, 1.0, step=0.05, label="Strength", info="0 an ordinary word, 1 this subject", min_width=140
            )
        with gr.Row():
            with gr.Column(scale=3, min_width=180):
                gr.Markdown("Its pictures: upload or paste one or several", elem_classes="caption")
                files = gr.Gallery(
                    show_label=False, type="filepath", columns=3, height=150, fit_columns=False, interactive=True,
                    sources=["upload", "clipboard"], object_fit="contain", elem_id=f"files-{number}",
                )  # fmt: skip
            with gr.Column(scale=2, min_width=120):
                gr.Markdown("What the encoder sees", elem_classes="caption")
                preview = gr.Gallery(
                    show_label=False, columns=2, height=150, interactive=False, allow_preview=False, object_fit="contain",
                    fit_columns=False, buttons=[], elem_id=f"seen-{number}",
                )  # fmt: skip
        framing = framing_for(pipe, chosen or "")
        with gr.Row(visible=False) as crop:
            sides = [gr.Slider(0, 100, value, step=1, label=f"{side} %", min_width=80) for side, value in SIDES.items()]
        note = gr.Markdown(elem_classes="notice", elem_id=f"note-{number}")
        with gr.Row():
            insert = gr.Button("Add a picture first", size="sm", interactive=False, min_width=120, elem_id=f"insert-{number}")
            remove = gr.Button("Remove", size="sm", min_width=60)
    return SlotPanel(group, kind, files, preview, strength, framing, crop, sides, note, insert, remove)


def build_slots(studio: Studio) -> tuple[list[SlotPanel], gr.Markdown]:
    """Four slots, the first one open; and the line that says so where a model has no adapter."""
    kinds = studio.pipe.kinds
    none = gr.Markdown("This model has no adapter here yet, so prompts go without subjects.", visible=not kinds)
    panels = [build_slot(studio.pipe, number) for number in range(MAX_SUBJECTS)]
    more = gr.Button("+ another subject", size="sm", elem_id="more")
    inputs = [component for panel in panels for component in panel.inputs]
    labels = [panel.insert for panel in panels]
    opened = gr.State(1)

    def pipe_of(request: gr.Request) -> NestedAttentionPipeline:
        return studio.session(str(request.session_hash)).pipe

    def looked(request: gr.Request, *values: Any) -> tuple[gr.Gallery, str, gr.Row]:
        return look(pipe_of(request), slot_of(values))

    def reframed(kind: str, request: gr.Request) -> gr.Dropdown:
        return framing_for(pipe_of(request), kind)

    more.click(lambda n: min(n + 1, MAX_SUBJECTS), opened, opened, api_visibility="private").then(
        lambda n: [gr.Group(visible=k < n) for k in range(MAX_SUBJECTS)],
        opened,
        [panel.group for panel in panels],
        api_visibility="private",
    )
    for panel in panels:
        seen = [panel.preview, panel.note, panel.crop]
        changes = [panel.files.change, panel.framing.change, *(side.release for side in panel.sides)]
        gr.on(changes, looked, panel.inputs, seen, api_visibility="private")
        panel.kind.change(reframed, panel.kind, panel.framing, api_visibility="private").then(
            looked, panel.inputs, seen, api_visibility="private"
        )
        panel.remove.click(lambda: (None, 1.0), None, [panel.files, panel.strength], api_visibility="private")
        gr.on([panel.files.change, panel.kind.change], lambda *values: slot_labels(values), inputs, labels, api_visibility="private")
    return panels, none
