"""The page: slots and prompt on the left, pictures and "Look inside" on the right."""

import gradio as gr

from nested_attention import NestedAttentionPipeline
from nested_attention.ui.api import build_api
from nested_attention.ui.controls import build_advanced, build_prompt, build_ready_made, knob_updates
from nested_attention.ui.examples import load_examples
from nested_attention.ui.handlers import CANCELLING, EXAMPLE, LOOKING, WAITING, Handlers, insert_missing, insert_one
from nested_attention.ui.inside import build_inside
from nested_attention.ui.models import build_models, use_model
from nested_attention.ui.slots import build_slots, framing_of, framings
from nested_attention.ui.studio import Studio

KEPT_SECONDS = 3600, 86400  # how often, and at which age, files that visitors uploaded or drew are deleted; all are at the end
TITLE = """## Nested Attention
Give a picture of a character, write a prompt with its placeholder, and get new pictures that show **that** character and follow the prompt.
"""
CSS = """
.problem p { color: var(--error-text-color, #b42318); margin: 4px 8px; }
.notice p { margin: 2px 0; }
.slot { border: 1px solid var(--border-color-primary); }
.slot .column { gap: 0; }
.slot .notice p { margin: 4px 10px; font-size: var(--text-sm); }
.grid-wrap.fixed-height { min-height: 0 !important; max-height: none !important; } /* galleries are as high as what they show */
#examples .grid-container { gap: 4px; grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
#examples .caption-label { left: 0; right: 0; max-width: none; border-radius: 0; padding: 1px 4px; font-size: 11px; text-align: center; }
.gradio-container .column { gap: 10px; }
.caption { background: var(--block-background-fill); }
.caption p { margin: 6px 10px; font-size: var(--text-sm); }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  .gradio-container .row { flex-wrap: wrap; }
  #examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
"""


def build_app(studio: Studio) -> gr.Blocks:
    """The whole page. Nothing is generated until somebody asks."""
    handlers = Handlers(studio, examples := load_examples())
    start = handlers.start
    with gr.Blocks(title="Nested Attention", analytics_enabled=False, delete_cache=KEPT_SECONDS) as page:
        gr.Markdown(TITLE)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                gr.Markdown("**1 · Start from an example**", visible=bool(examples))
                covers = gr.Gallery(
                    [(example.results[0], example.title) for example in examples], show_label=False, columns=6, height="auto",
                    allow_preview=False, interactive=False, object_fit="cover", visible=bool(examples), buttons=[], elem_id="examples",
                )  # fmt: skip
                gr.Markdown("**2 · Your subjects**")
                slots = build_slots(studio, start.slots if start else ())
                gr.Markdown("**3 · What should happen**")
                prompt = build_prompt(start, slots.names)
                with gr.Row():
                    generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                notice = gr.Markdown(elem_classes="notice problem", elem_id="notice")
                offer = gr.Button(visible=False, elem_id="offer")
            with gr.Column(scale=6, min_width=320):
                gr.Markdown("**4 · Pictures**")
                gallery = gr.Gallery(
                    list(start.results) if start else None, show_label=False, columns=2, object_fit="contain", height="auto",
                    interactive=False, format="png", elem_id="gallery",
                )  # fmt: skip
                status = gr.Markdown(EXAMPLE if start else "", elem_id="status")
                with gr.Accordion("With and without the subject", open=False):
                    compare = gr.Button("Draw the first picture once more with ordinary words", size="sm")
                    slider = gr.ImageSlider(
                        label="left: ordinary words · right: your subjects", interactive=False, height=380, elem_id="slider"
                    )
                with gr.Accordion("Settings in a picture", open=False):
                    gr.Markdown("Downloaded PNGs carry all parameters. Drop one here to get them back.")
                    dropped = gr.File(label="A PNG made here", type="filepath", file_types=[".png"], height=110, elem_id="dropped")
        with gr.Row():  # a row of its own: on a phone the pictures follow the button at once
            with gr.Column(scale=5, min_width=320):
                ready_made = build_ready_made(prompt)
                controls = build_advanced(prompt, studio.pipe, start)
                models = build_models(studio)
            with gr.Column(scale=6, min_width=320):
                inside = build_inside(studio)

        outputs = [gallery, status, notice, offer, controls.seed]
        asked = [generate_button.click, prompt.submit]
        until_its_turn = f"() => {WAITING!r}"
        gr.on([*asked, compare.click], None, None, status, js=until_its_turn, show_progress="hidden", api_visibility="private")
        running = gr.on(
            asked, handlers.generate, [*controls.inputs, *slots.inputs], outputs, concurrency_id="pipeline",
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        compared = compare.click(handlers.compare, None, [slider, status], concurrency_id="pipeline", api_visibility="private")
        running.failure(handlers.failed, None, gallery, queue=False, show_progress="hidden", api_visibility="private")
        until_its_end = f"(status) => /^({LOOKING}|Step|With)/.test(status) ? {CANCELLING!r} : status"
        cancel.click(None, status, status, js=until_its_end, show_progress="hidden", api_visibility="private")
        forgotten = gr.State()  # changes when runs that wait for their turn are to be taken out of the queue
        cancel.click(handlers.cancel, status, [status, forgotten], queue=False, show_progress="hidden", api_visibility="private")
        forgotten.change(None, cancels=[running, compared])
        offer.click(insert_missing, [prompt, *slots.inputs], [prompt, notice, offer], queue=False, api_visibility="private")
        for panel in slots.panels:
            panel.insert.click(insert_one, [prompt, panel.insert, panel.kind], prompt, queue=False, api_visibility="private")
        page_values = [*controls.inputs, *slots.inputs, slots.opened, notice, offer]
        restored = dropped.upload(handlers.restore, dropped, page_values, queue=False, api_visibility="private")
        picked = covers.select(handlers.pick, None, [*page_values, gallery, status, forgotten], queue=False, api_visibility="private")
        chosen = ready_made.click(handlers.ready_made, [ready_made, *slots.inputs], page_values, queue=False, api_visibility="private")
        kinds = [panel.kind for panel in slots.panels]
        adapted = [slots.no_adapter, *kinds, *(panel.framing for panel in slots.panels), *controls.adapted]
        loaded = models.load.click(
            use_model(studio, model_updates, len(adapted)), [models.base, models.adapter, *kinds], [models.about, models.note, *adapted],
            concurrency_id="pipeline", api_visibility="private",
        )  # fmt: skip
        for drawn in (running.success, picked.then, loaded.then):
            drawn(handlers.look_inside, None, [*inside.all, slider], queue=False, api_visibility="private")
        for filled in (restored, picked, chosen, loaded):
            slots.follow(filled)
        build_api(studio)
        page.unload(handlers.close)
    return page


def model_updates(pipe: NestedAttentionPipeline, *before: str | None) -> list:
    """How the page changes with the model: the line about adapters, kinds and framings of the slots, the knobs' defaults.

    `before`: the slots' kinds; those that the model knows too stay.
    """
    kinds = [kind if kind in pipe.kinds else next(iter(pipe.kinds), None) for kind in before]
    return [
        gr.Markdown(visible=not pipe.kinds), *(gr.Dropdown(list(pipe.kinds), value=kind) for kind in kinds),
        *(gr.Dropdown(framings(kind or "", 1), value=framing_of(pipe, kind or "")) for kind in kinds), *knob_updates(pipe),
    ]  # fmt: skip
