"""The app as a process of its own for tests: `python -m tests.serve PORT`, on tiny random weights."""

import sys

import gradio as gr

from nested_attention.ui.app import CSS, build_app
from nested_attention.ui.examples import FOLDER
from nested_attention.ui.studio import Studio
from tests import tiny


def main() -> None:
    page = build_app(Studio(tiny.pipeline("sd")))
    page.queue(max_size=20, default_concurrency_limit=2)
    page.launch(theme=gr.themes.Soft(), css=CSS, server_port=int(sys.argv[1]), quiet=True, allowed_paths=[str(FOLDER)])


if __name__ == "__main__":
    main()
