"""No sample of a batch drowns the others."""

import torch

from train.evening import evened


def test_forward_is_the_identity_and_no_gradient_is_longer_than_the_medians() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 2, 3, 4, requires_grad=True)
    wished = torch.randn(5, 2, 3, 4) * torch.tensor([0.1, 0.5, 1.0, 30.0, 4.0]).view(-1, 1, 1, 1)
    out = evened(rows)
    assert torch.equal(out, rows)
    out.backward(wished)
    assert rows.grad is not None
    lengths, before = rows.grad.flatten(1).norm(dim=1), wished.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, before.clamp(max=before.median()))
    torch.testing.assert_close(torch.cosine_similarity(rows.grad.flatten(1), wished.flatten(1)), torch.ones(5))


def test_alone_nothing_is_cut() -> None:
    rows = torch.ones(1, 4, requires_grad=True)
    evened(rows).backward(torch.full((1, 4), 9.0))
    assert rows.grad is not None and torch.equal(rows.grad, torch.full((1, 4), 9.0))
