"""Launches the app: `python app.py`. A Hugging Face Space runs the same file."""

import argparse
import gc
from contextlib import suppress
from threading import Thread

with suppress(ModuleNotFoundError):
    import spaces  # noqa: F401  # a Space on ZeroGPU has it; it has to come before torch, see `ui.gpu`

import gradio as gr

from nested_attention import NestedAttentionError, NestedAttentionPipeline
from nested_attention.errors import spoken_at_exit
from nested_attention.heap import keep_freed
from nested_attention.ui.app import CSS, build_app
from nested_attention.ui.examples import FOLDER
from nested_attention.ui.studio import Studio


def port_number(text: str) -> int:
    """What reads a port from the command line, as argparse's error says."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port; name one from 1 to 65535, or none for the next free one")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="storybook", help="which base model to load")
    parser.add_argument("--adapter", help="a folder or repo id; those that come with the base if not given")
    parser.add_argument("--device", help="cuda, mps or cpu; the best there is if not given")
    parser.add_argument("--port", type=port_number, help="7860 or the next free one if not given")
    parser.add_argument("--share", action="store_true", help="also make a public link")
    options = parser.parse_args()
    keep_freed()
    gc.freeze()  # what was imported stays: to look through it costs 0.3 s a full collection
    with spoken_at_exit():
        pipe = NestedAttentionPipeline.from_pretrained(options.base, options.adapter, options.device)
        launch(Studio(pipe, options.adapter), options.port, options.share)


def launch(studio: Studio, port: int | None, share: bool = False) -> None:
    """Serves the page until the process ends.

    Raises:
        NestedAttentionError: the port is taken, or the examples are damaged.
    """
    page = build_app(studio)
    Thread(target=studio.purge_for_ever, daemon=True).start()
    page.queue(max_size=20, default_concurrency_limit=2)  # what draws nothing is `queue=False`: 20 who wait keep nobody from the page
    try:
        page.launch(
            theme=gr.themes.Soft(primary_hue="indigo"), css=CSS, server_port=port, share=share, max_file_size="40mb",
            show_error=True, footer_links=["api", "settings"], allowed_paths=[str(FOLDER)],
        )  # fmt: skip
    except OSError as error:  # as gradio says that a port is taken
        raise NestedAttentionError(f"the page cannot be served ({error}); give another --port, or none for the next free one.") from error


if __name__ == "__main__":
    main()
