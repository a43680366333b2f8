"""On Hugging Face ZeroGPU a function must ask for the GPU; anywhere else this does nothing."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def on_gpu(function: Function) -> Function:
    """`spaces.GPU` where the `spaces` package is installed."""
    if importlib.util.find_spec("spaces") is None:
        return function
    return importlib.import_module("spaces").GPU(function)
