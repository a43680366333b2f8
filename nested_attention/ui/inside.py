"""The panel "Look inside": where each subject's word was looked at, and which of its tokens answered where."""

from dataclasses import dataclass

import gradio as gr

from nested_attention import NestedAttentionError
from nested_attention.tracing import Grid
from nested_attention.ui.explain import PointReport, enlarged, explain_point, heat, reference_heat, regions, value_picture
from nested_attention.ui.session import Result, result_of
from nested_attention.ui.studio import Studio

PARTS = {"all steps": None, "beginning": 0, "middle": 1, "end": 2}
INTRO = "Everything here was recorded while the picture was drawn, and every share is a probability. Click into the first picture."
NOTHING_YET = "Press Generate first: what is shown here is recorded while pictures are drawn."
NO_SUBJECT = "The last pictures were drawn without a subject, so there is nothing to look into."


@dataclass(frozen=True)
class Inside:
    """Introduction, choices, pictures, and the explanation of a clicked point."""

    intro: gr.Markdown
    subject: gr.Radio
    number: gr.Radio
    resolution: gr.Radio
    part: gr.Radio
    outer: gr.Image
    regions: gr.AnnotatedImage
    values: gr.Image
    flat: gr.Image
    point: gr.Markdown
    reference: gr.Gallery

    @property
    def choices(self) -> list[gr.Radio]:
        """In the order of the last arguments of `show`."""
        return [self.subject, self.number, self.resolution, self.part]

    @property
    def shown(self) -> list[gr.components.Component]:
        """In the order of what `show` returns."""
        return [self.outer, self.regions, self.values, self.flat, self.point, self.reference]

    @property
    def all(self) -> list[gr.components.Component]:
        """In the order of what `reset` returns."""
        return [self.intro, *self.choices, *self.shown]


def build_inside(studio: Studio) -> Inside:
    """The panel, closed; it shows nothing before somebody generates."""
    with gr.Accordion("Look inside", open=False, elem_id="inside"):
        intro = gr.Markdown(NOTHING_YET, elem_id="inside-intro")
        with gr.Row():
            subject = gr.Radio([], label="Subject", elem_id="inside-subject", min_width=140)
            number = gr.Radio([], label="Picture", min_width=140)
            resolution = gr.Radio(["all"], value="all", label="Resolution", min_width=140)
            part = gr.Radio(list(PARTS), value="all steps", label="Part of the schedule", min_width=140)
        with gr.Row():
            with gr.Column(min_width=240):
                gr.Markdown("**Where the subject's word is looked at** (click a point)")
                outer = gr.Image(interactive=False, buttons=[], show_label=False, elem_id="outer")
            with gr.Column(min_width=240):
                gr.Markdown("**Which of its tokens answers where**")
                areas = gr.AnnotatedImage(show_label=False, elem_id="regions")
        point = gr.Markdown(elem_id="point")
        reference = gr.Gallery(
            show_label=False, columns=3, height="auto", visible=False, object_fit="contain", fit_columns=False, buttons=[], elem_id="patches",
        )  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=200):
                gr.Markdown("**The subject's value, point by point** (main components as colours)")
                values = gr.Image(interactive=False, buttons=[], show_label=False)
            with gr.Column(min_width=200):
                gr.Markdown("**The ordinary word instead:** one value everywhere")
                flat = gr.Image(interactive=False, buttons=[], show_label=False)
    panel = Inside(intro, subject, number, resolution, part, outer, areas, values, flat, point, reference)

    def refresh(name: str, which: str, grid: str, when: str, request: gr.Request) -> list:
        return show(studio, str(request.session_hash), name, which, grid, when)

    def clicked(name: str, which: str, grid: str, when: str, event: gr.SelectData, request: gr.Request) -> tuple[str, gr.Gallery]:
        return explain(studio, str(request.session_hash), name, which, grid, when, event.index)

    for choice in panel.choices:
        choice.input(refresh, panel.choices, panel.shown, queue=False, api_visibility="private")
    outer.select(clicked, panel.choices, [point, reference], queue=False, api_visibility="private")
    return panel


def grid_of(name: str) -> Grid | None:
    """`"16 x 8"` -> `(16, 8)`, `"all"` -> None."""
    return None if name == "all" else (int(name.split(" x ")[0]), int(name.split(" x ")[1]))


def reset(studio: Studio, session: str) -> list:
    """What to look into after a generation or before any: values of `Inside.all`, with the first of each choice."""
    result = studio.session(session).result
    if result is None or not result.subjects:
        nothing = [
            gr.Radio([], value=None),
            gr.Radio([], value=None),
            gr.Radio(["all"], value="all"),
            gr.Radio(list(PARTS), value="all steps"),
        ]
        return [NOTHING_YET if result is None else NO_SUBJECT, *nothing, None, None, None, None, *unexplained()]
    names = [subject.placeholder for subject in result.subjects]
    numbers = [str(k + 1) for k in range(len(result.files))]
    grids = ["all", *(f"{height} x {width}" for height, width in result.maps.resolutions)]
    choices = [
        gr.Radio(names, value=names[0]),
        gr.Radio(numbers, value="1"),
        gr.Radio(grids, value="all"),
        gr.Radio([part for part, third in PARTS.items() if third is None or third in result.maps.thirds], value="all steps"),
    ]
    return [INTRO, *choices, *show(studio, session, names[0], "1", "all", "all steps")]


def show(studio: Studio, session: str, name: str, which: str, grid: str, when: str) -> list:
    """The panel's pictures for the given choices; a point that was explained in others is forgotten."""
    try:
        result = result_of(studio.session(session))
        maps, number, resolution, third = result.maps_of(name), int(which) - 1, grid_of(grid), PARTS[when]
        image = result.generation.images[number]
        values, flat = value_picture(maps, number, resolution or result.maps.resolutions[0], third)
        outer = heat(image, maps.outer(resolution or "mean", third)[number])
        return [outer, regions(image, maps, number, resolution, third), values, flat, *unexplained()]
    except NestedAttentionError as error:
        raise gr.Error(str(error), print_exception=False) from error


def unexplained() -> list:
    """Values of `point` and `reference` before a click."""
    return ["", gr.Gallery(None, visible=False)]


def explain(studio: Studio, session: str, name: str, which: str, grid: str, when: str, pixel: tuple[int, int]) -> tuple[str, gr.Gallery]:
    """What was routed to a clicked pixel of the heat picture, in words, and the patches of the reference it came from."""
    try:
        result = result_of(studio.session(session))
        number = int(which) - 1
        shown = enlarged(result.generation.images[number]).size
        report = explain_point(result, name, number, pixel[0] / shown[0], pixel[1] / shown[1], grid_of(grid), PARTS[when])
        patches = reference_heat(result, name, report.patches)
    except NestedAttentionError as error:
        raise gr.Error(str(error), print_exception=False) from error
    return told(result, name, report), gr.Gallery(patches, visible=True)


def told(result: Result, name: str, report: PointReport) -> str:
    """The report in words."""
    words = ", ".join(f"`{word}` {share:.0%}" for word, share in report.words.items())
    strength = result.maps_of(name).subject.strength
    tokens = ", ".join(f"token {token} ({share:.0%})" for token, share in report.tokens)
    return (
        f"At this point attention goes to: {words}.  \n`{name}` has strength {strength:g}: its value lies {strength:.0%} of the way "
        f"from the ordinary word's to that of its pictures.  \nOf `{name}`, the strongest answers come from: {tokens}. These were read from:"
    )
