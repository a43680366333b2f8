"""Up to four subject slots: kind, pictures, what the encoder will see, strength."""

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from nested_attention import NestedAttentionError
from nested_attention.images import padded_square, read_image
from nested_attention.settings import MAX_SUBJECTS
from nested_attention.subjects import MAX_STRENGTH
from nested_attention.ui.studio import Slot, slot_names


@dataclass(frozen=True)
class SlotPanel:
    """The components of one slot."""

    group: gr.Group
    kind: gr.Dropdown
    files: gr.Gallery
    preview: gr.Gallery
    strength: gr.Slider
    note: gr.Markdown
    insert: gr.Button
    remove: gr.Button

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.kind, self.files, self.strength]


def paths(files: Sequence[tuple[str, str | None]] | None) -> tuple[str, ...]:
    """The file paths in the value of a `gr.Gallery`."""
    return tuple(path for path, _ in files or ())


def read_slots(values: Sequence) -> list[Slot]:
    """The slots from the flat values of all panels' `inputs`."""
    return [Slot(kind, paths(files), strength) for kind, files, strength in zip(*[iter(values)] * 3, strict=True)]


def slot_labels(values: Sequence) -> list[gr.Button]:
    """How every slot's button should read, given the values of all panels' `inputs`: only slots with a picture count."""
    slots = read_slots(values)
    filled = [slot.kind if slot.files else "" for slot in slots]
    names = iter(slot_names([kind for kind in filled if kind]))
    return [
        gr.Button(f"Put {next(names)} into the prompt", interactive=True) if kind else gr.Button("Add a picture first", interactive=False)
        for kind in filled
    ]


def look(files: Sequence[tuple[str, str | None]] | None, size: int) -> tuple[gr.Gallery, str]:
    """What the encoder will see of the pictures in a slot, or why one of them cannot be used."""
    pictures, problems = [], []
    for path in paths(files):
        try:
            pictures.append(padded_square(read_image(path), size))
        except NestedAttentionError as error:
            problems.append(f"⚠️ {error}")
    return gr.Gallery(pictures, visible=bool(pictures)), "\n\n".join(problems)


def build_slots(kinds: Sequence[str], size: int) -> tuple[list[SlotPanel], gr.Button]:
    """Four slots, the first one open, and the button that opens the next. `size`: side of the encoder's input."""
    panels: list[SlotPanel] = []
    if not kinds:
        gr.Markdown("This base model has no adapter here yet, so prompts go without subjects.")
    for number in range(MAX_SUBJECTS if kinds else 0):
        with gr.Group(visible=number == 0, elem_classes="slot") as group:
            with gr.Row():
                kind = gr.Dropdown(
                    list(kinds),
                    value=kinds[number % len(kinds)] if number < 2 else kinds[0],
                    label=f"Subject {number + 1}",
                    min_width=110,
                    elem_id=f"kind-{number}",
                )
                strength = gr.Slider(
                    0, MAX_STRENGTH, 1.0, step=0.05, label="Strength", info="0 an ordinary word, 1 this subject", min_width=140
                )
            files = gr.Gallery(
                label="Its pictures: upload or paste one or several", type="filepath", columns=4, height=170, fit_columns=False,
                interactive=True, sources=["upload", "clipboard"], object_fit="contain", elem_id=f"files-{number}",
            )  # fmt: skip
            preview = gr.Gallery(
                label="What the encoder sees",
                columns=5,
                height=130,
                interactive=False,
                visible=False,
                allow_preview=False,
                object_fit="contain",
                fit_columns=False,
            )
            note = gr.Markdown(elem_classes="problem")
            with gr.Row():
                insert = gr.Button("Add a picture first", size="sm", interactive=False, min_width=120, elem_id=f"insert-{number}")
                remove = gr.Button("Remove", size="sm", min_width=60)
        panels.append(SlotPanel(group, kind, files, preview, strength, note, insert, remove))
    more = gr.Button("+ another subject", size="sm", elem_id="more", visible=bool(kinds))
    inputs = [component for panel in panels for component in panel.inputs]
    labels = [panel.insert for panel in panels]
    opened = gr.State(1)
    more.click(lambda n: min(n + 1, MAX_SUBJECTS), opened, opened, api_visibility="private").then(
        lambda n: [gr.Group(visible=k < n) for k in range(MAX_SUBJECTS)],
        opened,
        [panel.group for panel in panels],
        api_visibility="private",
    )
    for panel in panels:
        panel.files.change(lambda files: look(files, size), panel.files, [panel.preview, panel.note], api_visibility="private")
        panel.remove.click(lambda: (None, 1.0), None, [panel.files, panel.strength], api_visibility="private")
        gr.on([panel.files.change, panel.kind.change], lambda *values: slot_labels(values), inputs, labels, api_visibility="private")
    return panels, more
