"""The equation: the plain form, the fast form, and what both must obey."""

from dataclasses import replace

import pytest
import torch

from nested_attention import attention
from nested_attention.attention import LayerSubject, nested_probabilities, outer_probabilities, plain, widened
from nested_attention.tracing import nested_mean

HEADS, LENGTH, D = 3, 11, 16


def fast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, subjects: list[LayerSubject]) -> torch.Tensor:
    return attention.fast(query, widened(key, value, subjects), subjects)


def subject(batch: int, columns: tuple[int, ...], tokens: int = 5, norm: str = "none", **knobs: float) -> LayerSubject:
    mask = torch.zeros(batch, LENGTH)
    mask[:, list(columns)] = 1
    settings = {"strength": 1.0, "lam": 1.3, "token_weight": 1.0} | knobs
    key, value = torch.randn(2, batch, HEADS, tokens, D)
    return LayerSubject(mask, key, value, **{k: torch.tensor(v) for k, v in settings.items()}, value_norm=norm)  # type: ignore[arg-type]


def inputs(batch: int = 2, pixels: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, HEADS, pixels, D), torch.randn(batch, HEADS, LENGTH, D), torch.randn(batch, HEADS, LENGTH, D)


@pytest.mark.parametrize("norm", ["none", "full", "head"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_plain_equals_fast(count: int, norm: str) -> None:
    query, key, value = inputs()
    subjects = [subject(2, (2 + 2 * k,), 4 + k, norm, strength=0.6 + 0.2 * k, token_weight=0.5 + k) for k in range(count)]
    torch.testing.assert_close(fast(query, key, value, subjects), plain(query, key, value, subjects), atol=1e-5, rtol=0)


def test_plain_equals_fast_for_a_word_said_twice_and_shared_subject_rows() -> None:
    query, key, value = inputs(batch=3)
    subjects = [subject(1, (2, 7), norm="full", strength=0.7), subject(1, (4,))]
    torch.testing.assert_close(fast(query, key, value, subjects), plain(query, key, value, subjects), atol=1e-5, rtol=0)


def test_the_last_rows_have_the_subjects_and_the_others_none() -> None:
    query, key, value = inputs(batch=5)
    subjects = [subject(2, (2,), norm="full"), subject(1, (4, 5), 7, "head", token_weight=2.0)]
    out = attention.fast(query, widened(key, value, subjects, 2), subjects)
    stock = torch.nn.functional.scaled_dot_product_attention(query[:3], key[:3], value[:3])
    torch.testing.assert_close(out[:3], stock, atol=1e-6, rtol=0)
    torch.testing.assert_close(out[3:], plain(query[3:], key[3:], value[3:], subjects), atol=1e-5, rtol=0)


def test_without_strength_it_is_the_layer_itself() -> None:
    query, key, value = inputs()
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for form in (plain, fast):
        torch.testing.assert_close(form(query, key, value, [subject(2, (3, 5), strength=0.0)]), stock, atol=1e-6, rtol=0)


def test_with_full_strength_the_words_own_value_is_gone() -> None:
    query, key, value = inputs()
    other = value.clone()
    other[:, :, 3] += 5
    s = subject(2, (3,))
    for form in (plain, fast):
        torch.testing.assert_close(form(query, key, value, [s]), form(query, key, other, [s]), atol=1e-5, rtol=0)


def test_strength_two_goes_as_far_again_beyond_the_subject() -> None:
    query, key, value = inputs()
    s = subject(2, (3,))
    for form in (plain, fast):
        none, one, two = (form(query, key, value, [replace(s, strength=torch.tensor(strength))]) for strength in (0.0, 1.0, 2.0))
        torch.testing.assert_close(two - one, one - none, atol=1e-5, rtol=0)


def test_attention_elsewhere_does_not_change() -> None:
    """The key of the word stays: all shares of attention are the stock ones, only one value differs."""
    query, key, value = inputs()
    one, two = subject(2, (3,)), subject(2, (3,))
    difference = plain(query, key, value, [one]) - plain(query, key, value, [two])
    share = outer_probabilities(query, key, [one])[..., 3:4]
    values = [s.scaled(nested_probabilities(query, s) @ s.value, value) for s in (one, two)]
    torch.testing.assert_close(difference, share * (values[0] - values[1]), atol=1e-5, rtol=0)


def test_value_norm_sets_the_length_of_the_nested_value() -> None:
    query, _, value = inputs()
    s = subject(2, (3,), norm="full", lam=2.0)
    scaled = s.scaled(nested_probabilities(query, s) @ s.value, value)
    length = scaled.transpose(1, 2).flatten(2).norm(dim=-1)
    word = value[:, :, 3].flatten(1).norm(dim=-1)
    torch.testing.assert_close(length, 2.0 * word[:, None].expand_as(length))


def test_token_weight_multiplies_the_odds_of_the_word() -> None:
    query, key, _ = inputs()
    odds = []
    for weight in (1.0, 3.0):
        share = outer_probabilities(query, key, [subject(2, (3,), token_weight=weight)])[..., 3]
        odds.append(share / (1 - share))
    torch.testing.assert_close(odds[1], 3 * odds[0])


def test_muted_tokens_do_not_answer() -> None:
    query, key, value = inputs()
    s = subject(2, (3,), tokens=5)
    answering = torch.tensor([True, False, True, True, False])
    muted = LayerSubject(**{**s.__dict__, "answering": answering})
    removed = LayerSubject(**{**s.__dict__, "key": s.key[:, :, answering], "value": s.value[:, :, answering]})
    assert nested_probabilities(query, muted)[..., ~answering].max() == 0
    for form in (plain, fast):
        torch.testing.assert_close(form(query, key, value, [muted]), form(query, key, value, [removed]), atol=1e-6, rtol=0)


def test_rows_of_every_map_sum_to_one() -> None:
    query, key, _ = inputs()
    s = subject(2, (3,), token_weight=2.0)
    for shares in (outer_probabilities(query, key, [s]), nested_probabilities(query, s)):
        torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))


@pytest.mark.parametrize("block", [1, 300, 1 << 20])
def test_the_map_taken_in_blocks_is_the_mean_over_heads(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one head and one query at a time."""
    monkeypatch.setattr("nested_attention.tracing.BLOCK", {"cpu": block})
    query, _, _ = inputs()
    for s in (subject(2, (3,)), subject(1, (3,)), replace(subject(2, (3,)), answering=torch.tensor([True, False, True, True, False]))):
        torch.testing.assert_close(nested_mean(query, s), nested_probabilities(query, s).mean(1))
