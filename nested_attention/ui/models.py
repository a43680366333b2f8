"""One place to choose the base model and the adapter, with what each costs, before anything is fetched."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from nested_attention import NestedAttentionError, NestedAttentionPipeline
from nested_attention.adapters import WEIGHTS, list_adapters, read_config
from nested_attention.bases import BASES, Base, find_base
from nested_attention.estimate import Estimate, adapter_here, estimate
from nested_attention.faces import insightface_analysis, insightface_ready
from nested_attention.released import LICENCE, REPO
from nested_attention.ui.studio import Studio

OWN = "those that come with the base"
RUNS = Path("runs")  # where trainings and `import-released` leave adapters, if they are not told another folder
FETCH_FACES = "Fetch insightface's models for it: about 280 MB, non-commercial research only"


@dataclass(frozen=True)
class ModelPanel:
    """The components of the panel."""

    base: gr.Dropdown
    adapter: gr.Dropdown
    about: gr.Markdown
    load: gr.Button
    note: gr.Markdown


def build_models(studio: Studio) -> ModelPanel:
    pipe, started = studio.pipe, studio.adapter or OWN
    with gr.Accordion("Model", open=False, elem_id="models"):
        with gr.Row():
            base = gr.Dropdown(
                list(BASES), value=pipe.base.name, allow_custom_value=True, label="Base model", min_width=150, elem_id="base",
                info="A name, a diffusers folder, or a Hub repo id of the architecture of SDXL or SD 1.5.",
            )  # fmt: skip
            adapter = gr.Dropdown(
                list(dict.fromkeys((OWN, REPO, *local_adapters(), started))), value=started, allow_custom_value=True, label="Adapter",
                min_width=150, elem_id="adapter", info="A folder, or the repo id of a pushed adapter.",
            )  # fmt: skip
        about = gr.Markdown(loaded_text(pipe), elem_id="about-model")
        load = gr.Button("Use this model", size="sm", elem_id="load")
        note = gr.Markdown(elem_classes="problem")
        faces = gr.Markdown(faces_text(), elem_id="faces")
        fetch = gr.Button(FETCH_FACES, size="sm", visible=not insightface_ready(), elem_id="fetch-faces")
    fetch.click(fetch_faces, None, [faces, fetch], api_visibility="private")
    panel = ModelPanel(base, adapter, about, load, note)
    choices = [base, adapter]
    gr.on(
        [base.change, adapter.change], lambda name, own: described(studio, name, own), choices, [about, note], queue=False,
        api_visibility="private",
    )  # fmt: skip
    return panel


def faces_text() -> str:
    """How faces in photos are found on this machine."""
    by = "insightface, whose models are for non-commercial research" if insightface_ready() else "OpenCV, frontal ones only"
    return f"Faces in photos are found by {by}."


def fetch_faces() -> tuple[str, gr.Button]:
    """Fetches insightface's models, at the user's word."""
    try:
        insightface_analysis()
    except NestedAttentionError as error:
        return f"{faces_text()} ⚠️ {error}", gr.Button()
    return faces_text(), gr.Button(visible=False)


def base_of(choice: str | None) -> str:
    """What stands in the field of the base model, which may have been pasted with spaces around it."""
    return (choice or "").strip()


def adapter_of(choice: str | None) -> str | None:
    """The same of the adapter; None for those that come with the base."""
    named = base_of(choice)
    return None if named in ("", OWN) else named


def local_adapters() -> list[str]:
    """The folders of adapters below `RUNS`."""
    return sorted(str(path.parent) for below in ("*", "*/adapter") for path in RUNS.glob(f"{below}/{WEIGHTS}"))


def described(studio: Studio, name: str | None, adapter: str | None) -> tuple[str, str]:
    """What the chosen model and adapter are and cost, in words; and the problem, if there is one."""
    chosen = adapter_of(adapter)
    try:
        preset = find_base(base_of(name))
        beside, cost = adapter_text(preset, chosen), estimate(preset, studio.pipe.device, chosen)
    except NestedAttentionError as error:
        return "", f"⚠️ {error}"
    return f"**{preset.name}** · licence {preset.licence} · {cost_text(cost, studio.pipe)}. {beside}", ""


def adapter_text(preset: Base, adapter: str | None) -> str:
    """What the chosen adapter is, or those that come with the base: kind, size, the base that it was made for, licence.

    Raises:
        NestedAttentionError: it is on this machine and damaged, or a folder that is none.
    """
    if adapter is None:
        folders = list(list_adapters(preset.adapters).values()) if preset.adapters else []
        if not folders:
            return "It brings no adapter: choose one, or prompts go without subjects."
    elif (folder := adapter_here(adapter)) is not None:
        folders = [folder]
    elif adapter.partition("@")[0] == REPO:
        return f"Adapter: person, for sdxl, {spoken_licence(LICENCE)}."
    else:
        return "The adapter's licence stands on its page on the Hub."
    lines = []
    for folder in folders:
        config, size = read_config(folder), sum(path.stat().st_size for path in folder.glob(WEIGHTS))
        lines.append(f"{config.kind}, {size / 1e6:.0f} MB, for {config.base}, {spoken_licence(config.licence)}")
    return f"Adapter{'s' if len(lines) > 1 else ''}: {'; '.join(lines)}."


def spoken_licence(licence: str) -> str:
    return f"licence {licence}" + (" (not for commercial use)" if "-NC" in licence.upper() else "")


def cost_text(cost: Estimate, pipe: NestedAttentionPipeline) -> str:
    there = "on this machine" if cost.fetched else f"**{cost.download:.1f} GB to download**"
    memory = f"{cost.memory:.1f} GB of memory" + ("" if cost.fits else f", ⚠️ **of which only {cost.free:.1f} GB are free**")
    return f"{there} · {memory} · on {pipe.device.type}, {cost.placement}, about {spoken_time(cost.seconds)} a picture"


def spoken_time(seconds: float) -> str:
    """`"3 s"`, `"4 min"`, `"2 h"`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def loaded_text(pipe: NestedAttentionPipeline) -> str:
    """What is in use: base, device, and the licence of every adapter."""
    dtype = str(pipe.stock.unet.dtype).removeprefix("torch.")
    adapters = ", ".join(f"{kind} ({adapter.config.licence})" for kind, adapter in pipe.adapters.items()) or "none"
    return f"In use: **{pipe.base.name}** on {pipe.device.type} in {dtype}, licence {pipe.base.licence}. Adapters: {adapters}."


def use_model(studio: Studio, changed: Callable[..., list[Any]], count: int) -> Callable[..., Iterator[list]]:
    """A handler that loads the chosen model and yields `about`, `note`, and then the `count` values of `changed(pipe, *before)`.

    `before`: what the handler is given after the choice of base and adapter. Where the model stays, so does what the page holds.
    """

    def load(name: str, adapter: str, request: gr.Request, *before: Any) -> Iterator[list]:
        key, kept, problem = str(request.session_hash), [gr.skip()] * count, ""
        session = studio.session(key)
        shown = None if session.lost else session.pipe
        yield ["Loading; the first time it is downloaded …", "", *kept]
        try:
            studio.choose_model(key, base_of(name), adapter_of(adapter))
        except NestedAttentionError as error:
            problem = f"⚠️ {error}"
        pipe = session.pipe
        yield [loaded_text(pipe), problem, *(kept if pipe is shown else changed(pipe, *before))]

    return load
