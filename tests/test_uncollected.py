"""The import that holds the garbage collector off."""

import gc
import weakref

from nested_attention.uncollected import uncollected


class Node:
    """May point to itself, so that only the collector finds it."""


def test_garbage_of_whoever_imports_is_found() -> None:
    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    alive = weakref.ref(node)
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    del node
    gc.collect()
    assert alive() is None
