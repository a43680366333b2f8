"""An import without garbage collection."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Holds the garbage collector off, and counts what is there at the end as old.

    torch, transformers and diffusers make objects by the hundred thousand that all stay. To look through them again and
    again is an eighth of the time of their import. Nothing stays frozen: garbage of whoever imports this is found as ever.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what somebody else froze would thaw
            gc.freeze()
            gc.unfreeze()  # to the oldest generation, which is looked through least
        if collecting:
            gc.enable()
