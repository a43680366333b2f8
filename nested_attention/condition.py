"""What a request carries through the U-Net, in `cross_attention_kwargs={"nested": ...}`. Nothing of it is shared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from nested_attention.attention import LayerSubject, Text, split_heads, widened
from nested_attention.tracing import Recorder


@dataclass
class NestedCondition:
    """The subjects of one request, layer by layer.

    Attributes:
        rows: how many rows of the batch are conditional; they come last (classifier-free guidance puts them there).
        layers: layer name -> the subjects as that layer sees them.
        recorder: collects attention maps, if the request is traced.
        slice: so many queries attend at a time, to save memory; None for all.
        texts: layer name -> text states, and what the layer made of them at the first step.
    """

    rows: int
    layers: Mapping[str, Sequence[LayerSubject]]
    recorder: Recorder | None = None
    slice: int | None = None
    texts: dict[str, tuple[Tensor, Text]] = field(init=False, default_factory=dict)

    def subjects(self, layer: str) -> Sequence[LayerSubject]:
        return self.layers.get(layer, ())

    def text(self, layer: str, attention: Attention, states: Tensor) -> Text:
        """Keys and values of the text `states (B, L, C)` for `attention.fast`. They are made once and kept, since states do not change from
        step to step; not where gradients flow, which would flow once, nor in a compiled graph, which would be another one at the first step.
        """
        known, text = self.texts.get(layer, (None, None))
        if text is None or known is not states:
            text = widened(*keys_and_values(attention, states), self.subjects(layer), self.rows)
            if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.texts[layer] = states, text
        return text

    def record(self, layer: str, attention: Attention, query: Tensor, states: Tensor) -> None:
        """Shows the conditional rows of a layer with subjects to the recorder, if there is one: `query (B, heads, HW, d)`, text `states (B, L, C)`."""
        subjects = self.subjects(layer)
        if self.recorder is not None and subjects:
            rows = states[-self.rows :]
            self.recorder.record(layer, query[-self.rows :], lambda: keys_and_values(attention, rows), subjects)


def keys_and_values(attention: Attention, states: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's own, of `states (B, n, C)`: each `(B, heads, n, d)`."""
    return split_heads(attention.to_k(states), attention.heads), split_heads(attention.to_v(states), attention.heads)
