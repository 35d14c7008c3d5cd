"""KL divergence per token: against numpy, exact zeros, words without probability, and what cannot be compared."""

import math

import numpy as np
import pytest
import torch

from llmmpq.errors import CalibrationError
from llmmpq.evaluate import divergence as module
from llmmpq.evaluate.divergence import Divergence, divergence


def logits(num=50, vocabulary=37, *, seed=0, spread=4.0):
    return spread * torch.randn(num, vocabulary, generator=torch.Generator().manual_seed(seed))


def plain_kl(first, second):
    a, b = first.double().numpy(), second.double().numpy()
    p, q = np.exp(a), np.exp(b)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def test_equals_a_plain_computation():
    original, other = logits(), logits(seed=1)
    found = divergence(original, other)
    np.testing.assert_allclose(found.kl_N.numpy(), plain_kl(original, other), rtol=1e-10)
    assert found.agrees_N.tolist() == (original.numpy().argmax(-1) == other.numpy().argmax(-1)).tolist()
    assert 0 < int(found.agrees_N.sum()) < 50


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_small_changes_do_not_drown_in_rounding(size):
    """To second order KL is half the variance of the change."""
    original = logits(2000, spread=1.0)
    change = size * logits(2000, seed=1, spread=1.0).double()
    p = original.double().softmax(-1)
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    moved = (original.double() + change).float()
    expected = 0.5 * variance.mean().item()
    rounding = 1e-14  # the moved logits are float32 themselves
    assert divergence(original, moved).kl_N.mean().item() == pytest.approx(expected, rel=3 * size + 2e-2, abs=rounding)


def test_equal_logits_give_exactly_zero():
    original = logits(spread=30.0)
    found = divergence(original, original.clone())
    assert found.kl_N.tolist() == [0.0] * 50
    assert found.to_json() == {
        "kl_mean": 0.0,
        "kl_median": 0.0,
        "kl_p90": 0.0,
        "kl_p99": 0.0,
        "top1_agreement": 1.0,
        "num_tokens": 50,
    }


@pytest.mark.parametrize("num_positions", [1, 7, 50])
def test_chunks_change_nothing(num_positions, monkeypatch):
    whole = divergence(logits(), logits(seed=1)).kl_N
    monkeypatch.setattr(module, "CHUNK_NUM_LOGITS", 37 * num_positions)
    assert torch.equal(divergence(logits(), logits(seed=1)).kl_N, whole)


def test_words_that_only_pad_the_vocabulary_count_nothing():
    original, other = logits(), logits(seed=1)
    padded = [torch.cat([one, torch.full((50, 3), -math.inf)], -1) for one in (original, other)]
    assert torch.allclose(divergence(*padded).kl_N, divergence(original, other).kl_N, rtol=1e-12)
    finite = torch.cat([other, torch.full((50, 3), -60.0)], -1)
    assert torch.allclose(divergence(padded[0], finite).kl_N, divergence(original, other).kl_N, rtol=1e-9)


def test_a_word_that_the_other_holds_for_impossible_costs_infinity():
    other = logits()
    other[3, 5] = -math.inf
    found = divergence(logits(), other).kl_N
    assert found[3] == math.inf
    assert bool(torch.isfinite(found[4:]).all())


def test_nan_is_an_error_that_says_where():
    other = logits()
    other[[3, 8], 5] = math.nan
    with pytest.raises(CalibrationError, match="NaN at 2 of 50 positions"):
        divergence(logits(), other)


def test_the_tails():
    kl = torch.arange(101, dtype=torch.float64) / 100
    agrees = torch.arange(101) < 50
    parts = [Divergence(kl_N=kl[:30], agrees_N=agrees[:30]), Divergence(kl_N=kl[30:], agrees_N=agrees[30:])]
    assert Divergence.of(parts).to_json() == pytest.approx(
        {"kl_mean": 0.5, "kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "top1_agreement": 50 / 101, "num_tokens": 101}
    )
