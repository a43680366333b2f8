"""The two ways to softmax(q K^T) V agree, whichever this machine takes."""

import pytest
import torch
from torch.nn import functional as F

from nested_attention import products
from nested_attention.products import attended, by_heads, emulated

HEADS, QUERIES, TOKENS, D = 5, 24, 7, 16


def inputs(dtype: torch.dtype, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query = torch.randn(batch, QUERIES, HEADS, D, dtype=dtype).transpose(1, 2)  # as a layer makes it
    key, value = torch.randn(2, 1, HEADS, TOKENS, D, dtype=dtype)
    return query, key, value


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2, HEADS])  # at a time; two leave one over
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_by_heads_is_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, heads: int, masked: bool
) -> None:
    monkeypatch.setattr(products, "MAP", heads * QUERIES * TOKENS)
    query, key, value = inputs(dtype)
    allowed = torch.tensor([True, False, True, True, False, True, True]) if masked else None
    mask = None if allowed is None else allowed[None, None, None]
    expected = F.scaled_dot_product_attention(query, key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), mask)
    with torch.no_grad():
        for answer in (
            by_heads(query, key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), allowed),
            attended(query, key, value, allowed),
        ):
            torch.testing.assert_close(answer, expected, atol=tolerance, rtol=0)


def test_logits_can_have_another_scale() -> None:
    query, key, value = inputs(torch.float32, 1)
    with torch.no_grad():
        for answer in (by_heads(query, key, value, scale=0.7), attended(query, key, value, scale=0.7)):
            torch.testing.assert_close(answer, F.scaled_dot_product_attention(query, key, value, scale=0.7), atol=1e-6, rtol=0)


def test_what_stood_in_memory_before_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is written into memory as it is found, and that may hold no numbers."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan")))
    with torch.no_grad():
        assert by_heads(*inputs(torch.float32, 1)).isfinite().all()


def test_gradients_flow_in_every_dtype() -> None:
    query, key, value = inputs(torch.bfloat16)
    attended(query, key.requires_grad_(), value).sum().backward()
    assert key.grad is not None and key.grad.isfinite().all()


def test_only_bfloat16_on_a_cpu_is_emulated() -> None:
    assert not emulated(torch.device("cpu"), torch.float32)
    assert not emulated(torch.device("cuda"), torch.bfloat16)


def test_by_heads_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "AMX", False)
    torch._dynamo.reset()
    arguments = inputs(torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(attended, fullgraph=True, backend="eager")(*arguments)
        torch.testing.assert_close(compiled, attended(*arguments))
