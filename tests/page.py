"""What the page sends to its handlers, and what they send back."""

from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from nested_attention.ui.controls import CONTROLS
from nested_attention.ui.handlers import Handlers
from nested_attention.ui.session import Result
from nested_attention.ui.slots import VALUES, Slot, panel_values, slot_of

PROMPT = "<person> on the beach"
ANYBODY: Any = SimpleNamespace(session_hash="anybody")
OPENED = CONTROLS + 4 * VALUES  # where `restore` says which slots are open


def plain(value: Any) -> Any:
    """A component's value where a handler returned an update."""
    return value.value if isinstance(value, gr.components.Component) else value


def sent(values: list) -> list:
    """What the page sends back after an update of controls and slots: galleries come as pairs, skipped values as they began."""
    begin = [PROMPT, "", 2, 3, 3.0, 5, False, 1.0, 1.0, *panels()]
    values = [first if value == gr.skip() else plain(value) for value, first in zip(values, begin, strict=True)]
    return [[(file, None) for file in value] if isinstance(value, list) else value for value in values]


def panels(*slots: Slot) -> list:
    """Values of all four panels, `slots` in the first ones."""
    return [value for slot in [*slots, *[Slot("person", ())] * (4 - len(slots))] for value in panel_values(slot)]


def read(filled: list) -> list[Slot]:
    """The slots in what a handler gives the page."""
    sides = sent(filled[: CONTROLS + 4 * VALUES])[CONTROLS:]
    return [slot_of(sides[start : start + VALUES]) for start in range(0, len(sides), VALUES)]


def values(*slots: Slot, **changes: Any) -> list:
    controls = {
        "prompt": PROMPT,
        "negative": "",
        "count": 2,
        "steps": 3,
        "guidance": 3.0,
        "seed": 5,
        "new": False,
        "lam": 1.0,
        "weight": 1.0,
    }
    return sent([*(controls | changes).values(), *panels(*slots)])


def drawn(handlers: Handlers, *slots: Slot, **changes: Any) -> Result:
    *_, last = handlers.generate(ANYBODY, *values(*slots, **changes))
    assert "Done" in last[1], last
    result = handlers.studio.session("anybody").result
    assert result is not None and last[0] == list(result.files)
    return result


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file))
