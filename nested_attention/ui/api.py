"""Named endpoints for `gradio_client`: `/encode`, `/generate`, `/explain`. Subjects live in the client's session."""

from typing import Any

import gradio as gr

from nested_attention import NestedAttentionError, Progress
from nested_attention.ui.explain import explain_point
from nested_attention.ui.gpu import on_gpu
from nested_attention.ui.session import Slot, result_of
from nested_attention.ui.slots import framing_of
from nested_attention.ui.studio import Studio, framed_pictures


def spoken(error: NestedAttentionError) -> gr.Error:
    """The same sentence for whoever is asking."""
    return gr.Error(str(error), print_exception=False)


def build_api(studio: Studio) -> None:
    """Invisible components whose only use is that clients call them by name."""
    pipe = studio.pipe

    @on_gpu
    def encode(
        request: gr.Request, kind: str, files: list[str] | None, placeholder: str = "", strength: float = 1.0, lam: float | None = None,
        token_weight: float = 1.0, framing: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Encodes the pictures of one subject and keeps it, as the last few, for /generate; "framed" says what was done to each picture.

        `lam` and `framing` ("whole", "face", "face 2", ...) are the adapter's own if not given.
        """
        session = studio.session(str(request.session_hash))
        pipe = session.pipe
        try:
            slot = Slot(kind, tuple(files or ()), strength, framing or framing_of(pipe, kind))
            framed = framed_pictures(slot, session.faces)
            subject = studio.encode(session, pipe, slot, placeholder or None, framed, lam=lam, token_weight=token_weight)
            session.remember(subject)
        except NestedAttentionError as error:
            raise spoken(error) from error
        said = [made.said for made in framed]
        return {"placeholder": subject.placeholder, "kind": kind, "pictures": len(said), "tokens": subject.num_tokens, "framed": said}

    @on_gpu
    def generate(
        prompt: str, negative_prompt: str, num_images: float, steps: float, guidance_scale: float, seed: float, request: gr.Request
    ) -> tuple[list[str], dict[str, Any]]:
        """Pictures of a prompt with the session's subjects that it names; and the parameters."""
        session = studio.session(str(request.session_hash))
        try:
            with session.running() as run:
                subjects = session.named(prompt or "")  # clients may send null, which the settings refuse in words
                for event in studio.generate(
                    session, run, session.pipe, prompt, subjects, negative_prompt=negative_prompt, num_images=num_images, steps=steps,
                    guidance_scale=guidance_scale, seed=seed,
                ):  # fmt: skip
                    if not isinstance(event, Progress):
                        return list(event.files), event.generation.settings.as_dict()
            raise NestedAttentionError("the line was lost while the pictures were drawn; ask for them again.")
        except NestedAttentionError as error:
            raise spoken(error) from error

    def explain(placeholder: str, picture: float | None, x: float | None, y: float | None, request: gr.Request) -> dict[str, Any]:
        """Shares of attention at the point (x, y), fractions of width and height, of a picture (counted from 0)."""
        try:
            report = explain_point(result_of(studio.session(str(request.session_hash))), placeholder, picture, x, y)
        except NestedAttentionError as error:
            raise spoken(error) from error
        tokens = [{"token": token, "share": share} for token, share in report.tokens]
        return {"words": report.words, "tokens": tokens, "patches": report.patches.tolist()}

    with gr.Row(visible=False):
        kind, prompt, subject = gr.Textbox(), gr.Textbox(), gr.Textbox()  # what has a value at first may be left out
        placeholder, framing, negative = gr.Textbox(""), gr.Textbox(""), gr.Textbox(pipe.base.negative_prompt)
        files = gr.File(file_count="multiple", type="filepath")
        strength, lam, token_weight = gr.Number(1.0), gr.Number(None), gr.Number(1.0)
        count, steps = gr.Number(1), gr.Number(pipe.base.steps)
        guidance, seed = gr.Number(pipe.base.guidance_scale), gr.Number(0, precision=0)
        picture, x, y = gr.Number(0), gr.Number(0.5), gr.Number(0.5)
        answer, parameters, shares, pictures = gr.JSON(), gr.JSON(), gr.JSON(), gr.Files()
        gr.Button().click(
            encode, [kind, files, placeholder, strength, lam, token_weight, framing], answer, api_name="encode", concurrency_id="pipeline",
        )  # fmt: skip
        gr.Button().click(
            generate,
            [prompt, negative, count, steps, guidance, seed],
            [pictures, parameters],
            api_name="generate",
            concurrency_id="pipeline",
        )
        gr.Button().click(explain, [subject, picture, x, y], shares, api_name="explain", queue=False)
