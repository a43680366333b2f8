"""The kinds of subject. One file here is one kind: it is found by its `KIND`, nothing else has to change."""

import importlib
import pkgutil

from train.storybook.kinds.base import Kind

KINDS: dict[str, Kind] = {
    module.KIND.name: module.KIND
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name)
    if info.name != "base"
    for module in [importlib.import_module(f"{__name__}.{info.name}")]
}

__all__ = ["KINDS", "Kind"]
