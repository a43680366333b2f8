"""What `python -m nested_attention bench` prints."""

from nested_attention.bench.visitor import visitor_table
from tests import tiny


def test_every_wait_of_a_visitor_is_timed() -> None:
    waits = visitor_table(tiny.pipeline("sd"), repeats=1)
    assert {"import and load", "encode one picture", "four pictures"} <= waits.keys() and all(value > 0 for value in waits.values())
