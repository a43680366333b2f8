"""Nested attention (arXiv 2501.01407, section 3): the subject's word gets a value that depends on the query.

    v*(q)   = softmax(q K_n^T / sqrt(d)) V_n              the nested attention, over the subject's N tokens
    v~(q)   = lam * v*(q)  or  lam * |V[s]| / |v*| * v*   as the adapter was trained: without or with value norm
    V_q[s]  = (1 - strength) * V[s] + strength * v~(q)    the value of the subject's word s; other words keep V
    out(q)  = softmax(q K^T / sqrt(d) + log w) V_q        the layer's own attention; w weighs the column of s

The key of s stays the text key: the subject competes for attention exactly as its word does.

`plain` is this, letter by letter: it builds V_q, a value for every query and word. `fast` never does. With A the outer
softmax and a_s its column, out = A V' + sum_s strength * a_s * v~, where V' is V with the rows of s scaled by
1 - strength. One fused attention yields both A V' and the strength * a_s: a value channel per subject is its strength at
its word and 0 elsewhere, and one more query/key channel carries log w. A test holds the two forms to each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from nested_attention.products import attended

if TYPE_CHECKING:
    from nested_attention.condition import NestedCondition

ValueNorm = Literal["none", "full", "head"]


@dataclass(frozen=True)
class LayerSubject:
    """One subject as one cross-attention layer sees it. `B` is the batch, or 1 where all rows are alike.

    Attributes:
        columns: the text tokens that are its word, `(B, L)`, 1.0 or 0.0. Several columns share the nested value.
        key: nested keys K_n, `(B, heads, N, d)`.
        value: nested values V_n, `(B, heads, N, d)`.
        strength: 0 leaves the word as it is, 1 is the method. A tensor without shape, as the next two.
        lam: factor of the nested value; relative to the word's own norm unless `value_norm` is "none".
        token_weight: w > 0, factor of the word's attention before the softmax is normalized.
        value_norm: compare norms over all heads ("full"), in each head ("head"), or not at all ("none").
        answering: `(N,)` bool, the nested tokens that may answer; None for all.
    """

    columns: Tensor
    key: Tensor
    value: Tensor
    strength: Tensor
    lam: Tensor
    token_weight: Tensor
    value_norm: ValueNorm = "none"
    answering: Tensor | None = None

    def word_value(self, value: Tensor) -> Tensor:
        """V[s], the mean over its columns: `(B, heads, 1, d)`."""
        share = self.columns / self.columns.sum(1, keepdim=True).clamp(min=1)
        return share.to(value.dtype)[:, None, None] @ value

    def factor(self, nested: Tensor, value: Tensor) -> Tensor:
        """v~ / v*, of a shape that broadcasts to `nested (B, heads, HW, d)`, which is v*; `value (B, heads, L, d)` is the text's."""
        if self.value_norm == "none":
            return self.lam.to(nested.dtype)
        over = (1, 3) if self.value_norm == "full" else (3,)
        norms = [torch.linalg.vector_norm(x, dim=over, keepdim=True).float() for x in (self.word_value(value), nested)]
        return (self.lam * norms[0] / norms[1].clamp(min=1e-6)).to(nested.dtype)

    def scaled(self, nested: Tensor, value: Tensor) -> Tensor:
        """v~ from v*."""
        return self.factor(nested, value) * nested

    def log_weight(self) -> Tensor:
        """log w in the subject's columns, 0 elsewhere: `(B, L)`."""
        return self.columns * self.token_weight.log()


def attention_logits(query: Tensor, key: Tensor) -> Tensor:
    """How well each of `n` keys answers each query, before the softmax: `(B, heads, HW, n)`."""
    return query * query.shape[-1] ** -0.5 @ key.mT


def nested_probabilities(query: Tensor, subject: LayerSubject) -> Tensor:
    """Which nested token answers each query: `(B, heads, HW, N)`, rows sum to 1."""
    logits = attention_logits(query, subject.key)
    if subject.answering is not None:
        logits = logits.masked_fill(~subject.answering, float("-inf"))
    return logits.softmax(-1)


def nested_values(query: Tensor, subject: LayerSubject) -> Tensor:
    """v*, what these tokens answer, without their probabilities in memory: `(B, heads, HW, d)`."""
    return attended(query, subject.key, subject.value, subject.answering)


def outer_probabilities(query: Tensor, key: Tensor, subjects: Sequence[LayerSubject]) -> Tensor:
    """How each query divides its attention among the words: `(B, heads, HW, L)`, rows sum to 1."""
    logits = attention_logits(query, key)
    for subject in subjects:
        logits = logits + subject.log_weight()[:, None, None].to(logits.dtype)
    return logits.softmax(-1)


def plain(query: Tensor, key: Tensor, value: Tensor, subjects: Sequence[LayerSubject]) -> Tensor:
    """The equation as written. `query (B, heads, HW, d)`; `key`, `value (B, heads, L, d)` -> `(B, heads, HW, d)`."""
    values = value[:, :, None].expand(-1, -1, query.shape[2], -1, -1)  # (B, heads, HW, L, d)
    for subject in subjects:
        nested = subject.scaled(nested_probabilities(query, subject) @ subject.value, value)
        mine = subject.columns.bool()[:, None, None, :, None]  # (B, 1, 1, L, 1)
        values = torch.where(mine, (1 - subject.strength) * values + subject.strength * nested[..., None, :], values)
    return torch.einsum("bhql,bhqld->bhqd", outer_probabilities(query, key, subjects), values)


def fast(query: Tensor, key: Tensor, value: Tensor, subjects: Sequence[LayerSubject]) -> Tensor:
    """The same as `plain` by fused attention; nothing of size HW x L x d exists."""
    if not subjects:
        return F.scaled_dot_product_attention(query, key, value)
    batch, heads, _, d = query.shape
    width = -(-(d + len(subjects)) // 8) * 8  # fused kernels like widths that 8 divides

    def widened(tensor: Tensor, *channels: Tensor) -> Tensor:
        """`tensor (B, heads, n, d)` with `channels`, each `(B, n)`, and zeros behind: `(B, heads, n, width)`."""
        extra = F.pad(torch.stack(channels, -1), (0, width - d - len(channels))).to(tensor.dtype)
        return torch.cat([tensor, extra[:, None].expand(tensor.shape[0], heads, -1, -1)], -1)

    columns = [subject.columns.expand(batch, -1) for subject in subjects]  # (B, L) each
    log_weight = torch.stack([subject.log_weight().expand(batch, -1) for subject in subjects]).sum(0)
    kept = 1 - torch.stack([c * s.strength for c, s in zip(columns, subjects, strict=True)]).sum(0)
    out = attended(
        widened(query, torch.ones_like(query[:, 0, :, 0])),
        widened(key, log_weight * d**0.5),
        widened(value * kept.to(value.dtype)[:, None, :, None], *(c * s.strength for c, s in zip(columns, subjects, strict=True))),
        scale=d**-0.5,
    )
    out, shares = out[..., :d], out[..., d : d + len(subjects)].split(1, -1)
    for subject, share in zip(subjects, shares, strict=True):
        nested = nested_values(query, subject)
        out = torch.addcmul(out, share * subject.factor(nested, value), nested)
    return out


def in_slices(attend: Callable[[Tensor], Tensor], query: Tensor, size: int | None) -> Tensor:
    """`attend(query)` for `size` of the queries `(B, heads, HW, d)` at a time: the same result in less memory."""
    parts = [attend(part) for part in query.split(size or query.shape[2], 2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class NestedAttnProcessor(AttnProcessor2_0):
    """Attention of one layer: stock unless the request carries a `NestedCondition` with subjects for this layer.

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
        nested: "NestedCondition | None" = None,
    ) -> Tensor:
        subjects = nested.subjects(self.name) if nested is not None and encoder_hidden_states is not None else ()
        size = None if nested is None else nested.slice
        if not subjects and size is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection(read).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, n, d)
            for projection, read in ((attn.to_q, hidden_states), (attn.to_k, states), (attn.to_v, states))
        )
        rows = nested.rows if nested is not None and subjects else 0
        stock = query.shape[0] - rows  # rows without a subject come first: the unconditional half of guidance
        parts = []
        if stock:
            attend = partial(F.scaled_dot_product_attention, key=key[:stock], value=value[:stock])
            parts.append(in_slices(attend, query[:stock], size))
        if nested is not None and rows:
            parts.append(nested.attend(self.name, query[stock:], key[stock:], value[stock:], subjects))
        out = torch.cat([part.transpose(1, 2).flatten(2) for part in parts]).to(query.dtype)  # (B, HW, heads * d)
        return attn.to_out[1](attn.to_out[0](out))
