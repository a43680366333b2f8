"""On Hugging Face ZeroGPU a function must ask for the GPU; anywhere else this does nothing."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def on_gpu(function: Function) -> Function:
    """`spaces.GPU` where `app.py` found the `spaces` package; it has to be imported before torch, so it is not looked for here."""
    return sys.modules["spaces"].GPU(function) if "spaces" in sys.modules else function
