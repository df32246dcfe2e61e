"""The Kneser-Ney bigram: a distribution in every context, right by hand, and better than the unigram."""

import itertools

import numpy as np
import pytest
from calls import count

from moetrain.data.bigram import Bigram


def markov(length: int, *, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Tokens that mostly follow a fixed successor, over the lower half of the vocabulary."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random(length) < 0.7, 1, rng.integers(0, vocab_size // 2, length))
    return np.cumsum(steps) % (vocab_size // 2)


@pytest.mark.parametrize("length", [2, 3, 50, 5000])
def test_sums_to_one_in_every_context(length):
    V = 40
    model = Bigram(markov(length, vocab_size=V), vocab_size=V)
    contexts, nexts = np.meshgrid(np.arange(V), np.arange(V), indexing="ij")
    p = model.probabilities(contexts, nexts)
    assert p.shape == (V, V)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=0, atol=1e-12)


def test_matches_the_equations_written_out():
    tokens, V = markov(400, vocab_size=12), 12
    model = Bigram(tokens, vocab_size=V)
    count = np.zeros((V, V))
    for v, w in itertools.pairwise(tokens):
        count[v, w] += 1
    D, D2 = model.discount, model.discount_continuation
    assert pytest.approx((count == 1).sum() / ((count == 1).sum() + 2 * (count == 2).sum())) == D
    kinds = (count > 0).sum()
    before = (count > 0).sum(0)
    continuation = np.maximum(before - D2, 0) / kinds + D2 * (before > 0).sum() / kinds / V
    for v in range(V):
        for w in range(V):
            total = count[v].sum()
            p = continuation[w]
            if total:
                p = max(count[v, w] - D, 0) / total + D * (count[v] > 0).sum() / total * p
            assert model.probabilities(np.array([v]), np.array([w]))[0] == pytest.approx(p, rel=1e-12)


def test_beats_the_unigram_on_held_out_tokens():
    V = 64
    model, held_out = Bigram(markov(20_000, vocab_size=V), vocab_size=V), markov(5_000, vocab_size=V, seed=1)
    unigram = np.bincount(markov(20_000, vocab_size=V), minlength=V) + 1.0
    unigram_loss = -np.log(unigram / unigram.sum())[held_out[1:]].sum()
    assert model.loss(held_out[:-1], held_out[1:]) < 0.7 * unigram_loss


def test_ignored_targets_are_left_out():
    tokens = markov(1000, vocab_size=20)
    model = Bigram(tokens, vocab_size=20)
    targets = tokens[1:].copy()
    targets[::2] = -100
    whole = model.loss(tokens[:-1], tokens[1:])
    odd, even = model.loss(tokens[:-1], targets), model.loss(tokens[:-1][::2], tokens[1:][::2])
    assert odd + even == pytest.approx(whole)
    assert model.loss(tokens[:9].reshape(3, 3), tokens[1:10].reshape(3, 3)) > 0


def test_no_loop_over_tokens():
    tokens = (np.random.default_rng(0).zipf(1.3, 1_000_000) % 4096).astype(np.uint16)
    assert count(lambda: Bigram(tokens, vocab_size=4096)) < 1000
