"""Prompt box and advanced settings."""

from dataclasses import dataclass, fields

import gradio as gr

from nested_attention import NestedAttentionPipeline
from nested_attention.settings import RANGES
from nested_attention.subjects import MAX_LAM, MAX_TOKEN_WEIGHT
from nested_attention.ui.examples import READY_MADE, Example

WITHOUT_SUBJECTS = "a cat on the beach"  # the first prompt where a model has no adapter


@dataclass(frozen=True)
class Controls:
    """The components that decide a generation, besides the slots, in the order of the values that handlers take and give."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    num_images: gr.Slider
    steps: gr.Slider
    guidance_scale: gr.Slider
    seed: gr.Number
    new_seed: gr.Checkbox
    lam: gr.Slider
    token_weight: gr.Slider

    @property
    def inputs(self) -> list[gr.components.Component]:
        """All of them."""
        return [getattr(self, control.name) for control in fields(self)]

    @property
    def adapted(self) -> list[gr.components.Component]:
        """Those whose defaults depend on the model, in the order of `knob_defaults`."""
        return [self.steps, self.guidance_scale, self.negative_prompt, self.lam]


CONTROLS = len(fields(Controls))
PICTURES, SEED = 4, 7  # at first


def knob_defaults(pipe: NestedAttentionPipeline) -> list[float | str]:
    """Values for `Controls.adapted` that this model likes."""
    lam = max((adapter.config.lam for adapter in pipe.adapters.values()), default=1.0)
    return [pipe.base.steps, pipe.base.guidance_scale, pipe.base.negative_prompt, lam]


def steps_info(pipe: NestedAttentionPipeline) -> str:
    """The sentence at the steps."""
    return f"More is finer and slower; {pipe.base.fast_steps} gives a quick look."


def knob_updates(pipe: NestedAttentionPipeline) -> list[gr.Slider | float | str]:
    """Updates for `Controls.adapted`: the defaults, and what is said of them."""
    steps, *others = knob_defaults(pipe)
    return [gr.Slider(value=steps, info=steps_info(pipe)), *others]


def build_prompt(start: Example | None, names: gr.Markdown) -> gr.Textbox:
    """`start`: whose prompt stands there at first; `names`: the line with the placeholders, shown below."""
    prompt = gr.Textbox(
        start.prompt if start else WITHOUT_SUBJECTS, label="Prompt", lines=2, elem_id="prompt",
        info="Name every subject by its placeholder; the buttons above write it.",
    )  # fmt: skip
    names.render()
    return prompt


def build_ready_made(prompt: gr.Textbox) -> gr.Dataset:
    """Prompts for `prompt` to choose from."""
    return gr.Dataset(components=[prompt], samples=[[text] for text in READY_MADE], label="Ready-made prompts", samples_per_page=8)


def build_advanced(prompt: gr.Textbox, pipe: NestedAttentionPipeline, start: Example | None) -> Controls:
    """Closed by default; every knob says in one sentence what it does."""
    default_steps, default_guidance, default_negative, default_lam = knob_defaults(pipe)
    with gr.Accordion("Advanced", open=False):
        with gr.Row():
            num_images = gr.Slider(
                *RANGES["num_images"], PICTURES, step=1, label="Pictures", info="How many; picture k uses seed + k.", min_width=140
            )
            steps = gr.Slider(
                *RANGES["steps"], default_steps, step=1, label="Steps", min_width=140, elem_id="steps",
                info=steps_info(pipe),
            )  # fmt: skip
        with gr.Row():
            guidance = gr.Slider(
                *RANGES["guidance_scale"], default_guidance, step=0.1, label="Guidance", min_width=140,
                info="Higher follows the prompt more strictly, too high looks harsh; up to 1 it is off.",
            )  # fmt: skip
            with gr.Column(min_width=140):
                seed = gr.Number(
                    start.seed if start else SEED, label="Seed", precision=0, elem_id="seed",
                    info="The same seed repeats the same picture.",
                )  # fmt: skip
                new_seed = gr.Checkbox(
                    False,
                    label="New seed every time",
                    elem_id="new-seed",
                    info="Each press draws other pictures and writes their seed above.",
                )
        with gr.Row():
            lam = gr.Slider(
                0, MAX_LAM, default_lam, step=0.05, label="λ", min_width=140,
                info="Length of the subject's value: more pushes its looks harder, also where they do not belong.",
            )  # fmt: skip
            weight = gr.Slider(
                0.05, MAX_TOKEN_WEIGHT, 1.0, step=0.05, label="Token weight", min_width=140,
                info="How loudly the subject's word competes with the other words.",
            )  # fmt: skip
        negative = gr.Textbox(default_negative, label="Negative prompt", info="What the pictures should not show.")
    return Controls(prompt, negative, num_images, steps, guidance, seed, new_seed, lam, weight)
