"""softmax(q K^T) V for many queries and keys, by what computes it fastest where it runs.

That is torch's fused kernel, but for one case. On a CPU that computes in bfloat16 without AMX it leaves its two products to a library
that then computes them in float32, at a quarter of the speed of `torch.bmm` (AMD EPYC, 2 cores: 175 and 750 GFLOP/s). There the map is
built after all, of a few heads at a time, so that it stays in the processor's cache.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
MAP = 1 << 21  # elements of the map at a time; at least those of one head


def attended(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None, scale: float | None = None) -> Tensor:
    """`query (B, heads, HW, d)`; `key`, `value (B or 1, heads, N, d)` -> `(B, heads, HW, d)`.

    `allowed`: `(N,)` bool, the keys that may answer; None for all. `scale`: of the logits; 1 / sqrt(d) if not given.
    """
    key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    if emulated(query.device, query.dtype) and not torch.is_grad_enabled():
        return by_heads(query, key, value, allowed, scale)
    return F.scaled_dot_product_attention(query, key, value, None if allowed is None else allowed[None, None, None], scale=scale)


def emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel computes in `dtype` by way of float32."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not AMX


def by_heads(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The same with the map of some heads in memory, always in the same place. No gradient flows back through it."""
    batch, heads, length, d = query.shape
    scale = d**-0.5 if scale is None else scale
    some = max(1, min(heads, MAP // (length * key.shape[2])))
    place = query.new_empty(some, length, key.shape[2])
    out = query.new_empty(batch, length, heads, d).transpose(1, 2)  # laid out as the layer wants it next
    for row in range(batch):
        for q, k, v, answer in zip(*(x[row].split(some) for x in (query, key, value, out)), strict=True):
            logits = place[: len(q)]
            torch.baddbmm(logits, q, k.mT, beta=0, alpha=scale, out=logits)
            if allowed is not None:
                logits.masked_fill_(~allowed, float("-inf"))
            answer.copy_(torch.bmm(torch.softmax(logits, -1, out=logits), v))
    return out
