"""The page: slots and prompt on the left, pictures and "Look inside" on the right."""

import gradio as gr

from nested_attention import NestedAttentionPipeline
from nested_attention.settings import MAX_SUBJECTS
from nested_attention.ui.api import build_api
from nested_attention.ui.controls import build_advanced, build_prompt, knob_defaults
from nested_attention.ui.examples import load_examples
from nested_attention.ui.handlers import Handlers, insert_one
from nested_attention.ui.inside import build_inside
from nested_attention.ui.models import build_models, use_model
from nested_attention.ui.slots import build_slots, framing_for
from nested_attention.ui.studio import Studio

TITLE = """# Nested Attention
Give a picture of a character, write a prompt with its placeholder, and get new pictures that show **that** character and follow the prompt.
"""
CSS = """
.problem p { color: var(--error-text-color, #b42318); margin: 4px 8px; }
.notice p { margin: 2px 0; }
.slot { border: 1px solid var(--border-color-primary); }
.grid-wrap.fixed-height { min-height: 0 !important; } /* galleries are as high as what they show */
.caption { background: var(--block-background-fill); }
.caption p { margin: 6px 10px; font-size: var(--text-sm); }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } .gradio-container .row { flex-wrap: wrap; } }
"""


def build_app(studio: Studio) -> gr.Blocks:
    """The whole page. Nothing is generated until somebody asks."""
    examples = load_examples()
    start = examples[0] if examples else None
    with gr.Blocks(title="Nested Attention", analytics_enabled=False) as page:
        gr.Markdown(TITLE)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                gr.Markdown("**1 · Start from an example**", visible=bool(examples))
                covers = gr.Gallery(
                    [(example.results[0], example.title) for example in examples], show_label=False, columns=3, height="auto",
                    allow_preview=False, interactive=False, object_fit="cover", visible=bool(examples), buttons=[], elem_id="examples",
                )  # fmt: skip
                models = build_models(studio)
                gr.Markdown("**2 · Your subjects**")
                panels, no_adapter = build_slots(studio)
                gr.Markdown("**3 · What should happen**")
                prompt = build_prompt()
                with gr.Row():
                    generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                notice = gr.Markdown(elem_classes="notice problem", elem_id="notice")
                offer = gr.Button(visible=False, elem_id="offer")
                controls = build_advanced(prompt, studio.pipe)
            with gr.Column(scale=6, min_width=320):
                gr.Markdown("**4 · Pictures**")
                gallery = gr.Gallery(
                    list(start.results) if start else None, show_label=False, columns=2, object_fit="contain", height="auto",
                    interactive=False, format="png", elem_id="gallery",
                )  # fmt: skip
                status = gr.Markdown("A finished example. Press Generate to draw your own." if start else "", elem_id="status")
                with gr.Accordion("With and without the subject", open=False):
                    compare = gr.Button("Draw the first picture once more with ordinary words", size="sm")
                    slider = gr.ImageSlider(label="left: ordinary words · right: your subjects", interactive=False, height=380)
                with gr.Accordion("Settings in a picture", open=False):
                    gr.Markdown("Downloaded PNGs carry all parameters. Drop one here to get them back.")
                    dropped = gr.File(label="A PNG made here", type="filepath", file_types=[".png"], height=110, elem_id="dropped")
                inside, _ = build_inside(studio)

        slot_inputs = [component for panel in panels for component in panel.inputs]

        handlers = Handlers(studio, examples)
        outputs = [gallery, status, notice, offer, controls.seed]
        running = gr.on(
            [generate_button.click, prompt.submit], handlers.generate, [*controls.inputs, *slot_inputs], outputs, concurrency_id="pipeline",
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        running.success(handlers.look_inside, None, [*inside.choices, *inside.pictures], api_visibility="private")
        cancel.click(lambda: "Cancelled.", None, status, cancels=[running], api_visibility="private", queue=False)
        offer.click(handlers.insert_missing, [prompt, *slot_inputs], [prompt, notice, offer], api_visibility="private")
        for panel in panels:
            panel.insert.click(insert_one, [prompt, panel.insert, panel.kind], prompt, api_visibility="private")
        compare.click(handlers.compare, None, slider, concurrency_id="pipeline", api_visibility="private")
        dropped.upload(handlers.restore, dropped, [*controls.inputs, *slot_inputs, notice], api_visibility="private")
        covers.select(
            handlers.pick,
            None,
            [prompt, controls.seed, gallery, status, *slot_inputs, *(p.group for p in panels)],
            api_visibility="private",
        )
        adapted = [no_adapter, *(panel.kind for panel in panels), *(panel.framing for panel in panels), *controls.adapted]
        models.load.click(
            use_model(studio, model_updates, len(adapted)), [models.base, models.adapter], [models.about, models.note, *adapted],
            concurrency_id="pipeline", api_visibility="private",
        )  # fmt: skip
        build_api(studio)
        page.unload(handlers.close)
    return page


def model_updates(pipe: NestedAttentionPipeline) -> list:
    """How the page changes with the model: the line about adapters, kinds and framings of the slots, the knobs' defaults."""
    kinds = list(pipe.kinds)
    first = kinds[0] if kinds else None
    return [
        gr.Markdown(visible=not kinds), *(gr.Dropdown(kinds, value=first) for _ in range(MAX_SUBJECTS)),
        *(framing_for(pipe, first or "") for _ in range(MAX_SUBJECTS)), *knob_defaults(pipe),
    ]  # fmt: skip
