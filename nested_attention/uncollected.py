"""An import without garbage collection."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Holds the garbage collector off, and keeps it away from what is there at the end.

    torch, transformers and diffusers make objects by the hundred thousand that all stay. To look through them again and
    again is an eighth of the time of their import, and later costs 0.3 s a full collection.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
