"""Nested attention (arXiv 2501.01407, section 3): the subject's word gets a value that depends on the query.

    v*(q)   = softmax(q K_n^T / sqrt(d)) V_n              the nested attention, over the subject's N tokens
    v~(q)   = lam * v*(q)  or  lam * |V[s]| / |v*| * v*   as the adapter was trained: without or with value norm
    V_q[s]  = (1 - strength) * V[s] + strength * v~(q)    the value of the subject's word s; other words keep V
    out(q)  = softmax(q K^T / sqrt(d) + log w) V_q        the layer's own attention; w weighs the column of s

The key of s stays the text key: the subject competes for attention exactly as its word does.

`plain` is this, letter by letter: it builds V_q, a value for every query and word. `fast` never does. With A the outer
softmax and a_s its column, out = A V' + sum_s strength * a_s * v~, where V' is V with the rows of s scaled by
1 - strength. One fused attention yields both A V' and the strength * a_s: a value channel per subject is its strength, times lam
|V[s]|, at its word and 0 elsewhere, and one more query/key channel carries log w. `widened` puts them there, once a
picture, since none of it depends on the step. A test holds the two forms to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_attention.products import attended

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

    def norm(self, values: Tensor) -> Tensor:
        """|v| of values `(B, heads, n, d)`, as they are compared: `(B, 1 or heads, n, 1)`."""
        return torch.linalg.vector_norm(values, dim=(1, 3) if self.value_norm == "full" else 3, keepdim=True)

    def reach(self, value: Tensor) -> Tensor:
        """lam, or lam * |V[s]|, of the text's values `(B, heads, L, d)`: a shape that broadcasts to them."""
        return self.lam if self.value_norm == "none" else self.lam * self.norm(self.word_value(value)).float()

    def over_norm(self, factor: Tensor, nested: Tensor) -> Tensor:
        """`factor`, or `factor` / |v*|, for v* `(B, heads, HW, d)`."""
        return factor if self.value_norm == "none" else factor / self.norm(nested).clamp(min=1e-6)

    def scaled(self, nested: Tensor, value: Tensor) -> Tensor:
        """v~ from v*."""
        return self.over_norm(self.reach(value), nested).to(nested.dtype) * nested

    def log_weight(self) -> Tensor:
        """log w in the subject's columns, 0 elsewhere: `(B, L)`."""
        return self.columns * self.token_weight.log()


def split_heads(states: Tensor, heads: int) -> Tensor:
    """`(B, n, heads * d)` -> `(B, heads, n, d)`."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


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


@dataclass(frozen=True)
class Text:
    """The text's keys and values as `fast` reads them, `(B, heads, L, d or more)`; the last `rows` of the batch know the subjects."""

    key: Tensor
    value: Tensor
    rows: int


def widened(key: Tensor, value: Tensor, subjects: Sequence[LayerSubject], rows: int | None = None) -> Text:
    """`key`, `value (B, heads, L, d)` with what `subjects` ask of the last `rows` of the batch, all if not given."""
    if not subjects:
        return Text(key, value, 0)
    batch, heads, length, d = key.shape
    rows = batch if rows is None else rows
    width = -(-(d + len(subjects)) // 8) * 8  # fused kernels like widths that 8 divides
    channels = key.new_zeros(2, batch, heads, length, width - d)
    kept = value.new_ones(batch, length)
    for number, subject in enumerate(subjects):
        mine = subject.columns * subject.strength  # (rows or 1, L)
        channels[0, -rows:, :, :, 0] += subject.log_weight()[:, None] * d**0.5
        channels[1, -rows:, :, :, number, None] = mine[:, None, :, None] * subject.reach(value[-rows:])
        kept[-rows:] -= mine
    return Text(torch.cat([key, channels[0]], -1), torch.cat([value * kept[:, None, :, None], channels[1]], -1), rows)


def fast(query: Tensor, text: Text, subjects: Sequence[LayerSubject]) -> Tensor:
    """The same as `plain` by fused attention, given the `text` that is `widened` for these subjects; nothing of size HW x L x d exists."""
    if not subjects:
        return F.scaled_dot_product_attention(query, text.key, text.value)
    d = query.shape[-1]
    out = attended(F.pad(query, (0, text.key.shape[-1] - d), value=1.0), text.key, text.value, scale=d**-0.5)
    out, shares = out[..., :d].transpose(1, 2).contiguous().transpose(1, 2), out[-text.rows :, ..., d:]
    personal, query = out[-text.rows :], query[-text.rows :]
    for subject, share in zip(subjects, shares.split(1, -1), strict=False):  # zeros are behind the last one
        nested = nested_values(query, subject)
        personal.addcmul_(subject.over_norm(share, nested), nested)
    return out
