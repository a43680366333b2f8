"""Prompt box and advanced settings."""

from dataclasses import dataclass

import gradio as gr

from nested_attention import NestedAttentionPipeline
from nested_attention.settings import MAX_PROMPT, MAX_SEED
from nested_attention.subjects import MAX_LAM, MAX_TOKEN_WEIGHT
from nested_attention.ui.examples import READY_MADE


@dataclass(frozen=True)
class Controls:
    """The components that decide a generation, besides the slots."""

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
        """In the order of the arguments of `app.generate`."""
        return [
            self.prompt, self.negative_prompt, self.num_images, self.steps, self.guidance_scale, self.seed, self.new_seed, self.lam,
            self.token_weight,
        ]  # fmt: skip

    @property
    def adapted(self) -> list[gr.components.Component]:
        """Those whose defaults depend on the model, in the order of `knob_defaults`."""
        return [self.steps, self.guidance_scale, self.negative_prompt, self.lam]


def knob_defaults(pipe: NestedAttentionPipeline) -> list[float | str]:
    """Values for `Controls.adapted` that this model likes."""
    lam = max((adapter.config.lam for adapter in pipe.adapters.values()), default=1.0)
    return [pipe.base.steps, pipe.base.guidance_scale, pipe.base.negative_prompt, lam]


def build_prompt() -> gr.Textbox:
    prompt = gr.Textbox(
        READY_MADE[0], label="Prompt", lines=2, max_length=MAX_PROMPT, elem_id="prompt",
        info="Name every subject by its placeholder, such as <person>; the buttons above write it for you.",
    )  # fmt: skip
    gr.Examples([[text] for text in READY_MADE], [prompt], label="Ready-made prompts", examples_per_page=8)
    return prompt


def build_advanced(prompt: gr.Textbox, pipe: NestedAttentionPipeline) -> Controls:
    """Closed by default; every knob says in one sentence what it does."""
    default_steps, default_guidance, default_negative, default_lam = knob_defaults(pipe)
    with gr.Accordion("Advanced", open=False):
        with gr.Row():
            num_images = gr.Slider(1, 8, 4, step=1, label="Pictures", info="How many; picture k uses seed + k.", min_width=140)
            steps = gr.Slider(
                1,
                60,
                default_steps,
                step=1,
                label="Steps",
                info=f"More is finer and slower; {pipe.base.fast_steps} gives a quick look.",
                min_width=140,
            )
        with gr.Row():
            guidance = gr.Slider(
                1,
                10,
                default_guidance,
                step=0.1,
                label="Guidance",
                info="Higher follows the prompt more strictly, too high looks harsh.",
                min_width=140,
            )
            with gr.Column(min_width=140):
                seed = gr.Number(
                    7,
                    label="Seed",
                    precision=0,
                    minimum=0,
                    maximum=MAX_SEED,
                    info="The same seed repeats the same picture.",
                    elem_id="seed",
                )
                new_seed = gr.Checkbox(False, label="New seed every time")
        with gr.Row():
            lam = gr.Slider(
                0,
                MAX_LAM,
                default_lam,
                step=0.05,
                label="λ",
                info="Length of the subject's value: more pushes its looks harder, also where they do not belong.",
                min_width=140,
            )
            weight = gr.Slider(
                0.1,
                MAX_TOKEN_WEIGHT,
                1.0,
                step=0.1,
                label="Token weight",
                info="How loudly the subject's word competes with the other words.",
                min_width=140,
            )
        negative = gr.Textbox(default_negative, label="Negative prompt", max_length=MAX_PROMPT, info="What the pictures should not show.")
    return Controls(prompt, negative, num_images, steps, guidance, seed, new_seed, lam, weight)
