"""What a request carries through the U-Net, in `cross_attention_kwargs={"nested": ...}`. Nothing of it is shared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nested_attention.attention import LayerSubject, fast, in_slices
from nested_attention.tracing import Recorder

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[LayerSubject]], Tensor]


@dataclass
class NestedCondition:
    """The subjects of one request, layer by layer.

    Attributes:
        rows: how many rows of the batch are conditional; they come last (classifier-free guidance puts them there).
        layers: layer name -> the subjects as that layer sees them.
        recorder: collects attention maps, if the request is traced.
        slice: so many queries attend at a time, to save memory; None for all.
        form: `attention.fast`, or `attention.plain` to compare with.
    """

    rows: int
    layers: Mapping[str, Sequence[LayerSubject]]
    recorder: Recorder | None = None
    slice: int | None = None
    form: Attend = fast

    def subjects(self, layer: str) -> Sequence[LayerSubject]:
        return self.layers.get(layer, ())

    def attend(self, layer: str, query: Tensor, key: Tensor, value: Tensor, subjects: Sequence[LayerSubject]) -> Tensor:
        """`(rows, heads, HW, d)` queries with text keys and values -> the layer's output before its projection."""
        if self.recorder is not None:
            self.recorder.record(layer, query, key, value, subjects)
        return in_slices(lambda part: self.form(part, key, value, subjects), query, self.slice)
