"""How nested attention gets into a U-Net: the attention processor that stands in every layer."""

from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from nested_attention.attention import LayerSubject, Text, fast, split_heads
from nested_attention.condition import NestedCondition, keys_and_values


class NestedAttnProcessor(AttnProcessor2_0):
    """Attention of one layer: stock unless a request carries a `NestedCondition`, which for a layer without subjects is the same, faster.

    It is installed in every layer, self-attention too, since diffusers hands `cross_attention_kwargs` to all of them.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name  # the layer's name in `unet.attn_processors`

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        nested: NestedCondition | None = None,
    ) -> Tensor:
        if nested is None or (encoder_hidden_states is None and nested.slice is None):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        if encoder_hidden_states is None:
            subjects: Sequence[LayerSubject] = ()
            text = Text(*keys_and_values(attn, hidden_states), 0)
        else:
            subjects, text = nested.subjects(self.name), nested.text(self.name, attn, encoder_hidden_states)
            nested.record(self.name, attn, query, encoder_hidden_states)
        out = in_slices(lambda part: fast(part, text, subjects), query, nested.slice)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def in_slices(attend: Callable[[Tensor], Tensor], query: Tensor, size: int | None) -> Tensor:
    """`attend(query)` for `size` of the queries `(B, heads, HW, d)` at a time: the same result in less memory."""
    parts = [attend(part) for part in query.split(size or query.shape[2], 2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
