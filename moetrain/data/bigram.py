"""The bigram baseline: an interpolated Kneser-Ney language model, fitted in seconds; a trained model has to beat it."""

import numpy as np


class Bigram:
    """Interpolated Kneser-Ney bigrams over a token array (Kneser & Ney 1995; Chen & Goodman 1998, section 4.1.6).

    With c(v, w) the count of the pair, c(v) = sum_w c(v, w), N1+(v .) the number of distinct tokens after v, N1+(. w)
    the number of distinct tokens before w, and N1+(. .) the number of distinct pairs:

        P(w | v)  = max(c(v, w) - D, 0) / c(v)  +  D N1+(v .) / c(v) * P_cont(w)
        P_cont(w) = max(N1+(. w) - D', 0) / N1+(. .)  +  D' |{w: N1+(. w) > 0}| / N1+(. .) * 1 / V

    and P(w | v) = P_cont(w) for a v that was never seen. The absolute discounts are D = n1 / (n1 + 2 n2), n_r the
    number of pairs that occur r times, and D' likewise from the counts N1+(. w).
    """

    def __init__(self, tokens: np.ndarray, *, vocab_size: int) -> None:
        tokens = np.asarray(tokens, dtype=np.int64)
        assert len(tokens) > 1, "a bigram needs two tokens"
        assert int(tokens.max()) < vocab_size, f"token id {int(tokens.max())} is not below vocab_size={vocab_size}"
        self.vocab_size = vocab_size
        self._pairs, self._counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        contexts, nexts = np.divmod(self._pairs, vocab_size)
        self._context_count = np.bincount(contexts, weights=self._counts, minlength=vocab_size)
        followers = np.bincount(contexts, minlength=vocab_size)
        predecessors = np.bincount(nexts, minlength=vocab_size)
        self.discount = _discount(self._counts)
        self.discount_continuation = _discount(predecessors[predecessors > 0])
        mass = self.discount_continuation * (predecessors > 0).sum() / len(self._pairs)
        discounted = np.maximum(predecessors - self.discount_continuation, 0) / len(self._pairs)
        self._continuation = discounted + mass / vocab_size
        with np.errstate(divide="ignore", invalid="ignore"):
            backoff = self.discount * followers / self._context_count
        self._backoff = np.where(self._context_count > 0, backoff, 1.0)

    def probabilities(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """P(target | input) of each pair, float64, in the shape of the arguments."""
        inputs, targets = np.asarray(inputs, dtype=np.int64), np.asarray(targets, dtype=np.int64)
        wanted = inputs * self.vocab_size + targets
        found = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        counts = np.where(self._pairs[found] == wanted, self._counts[found], 0)
        direct = np.maximum(counts - self.discount, 0) / np.maximum(self._context_count[inputs], 1)
        return direct + self._backoff[inputs] * self._continuation[targets]

    def loss(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """The summed negative log-likelihood in nats; pairs whose target is negative (-100) are left out."""
        inputs, targets = np.asarray(inputs), np.asarray(targets)
        counted = targets >= 0
        return float(-np.log(self.probabilities(inputs[counted], targets[counted])).sum())


def _discount(counts: np.ndarray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    estimate = once / (once + 2 * twice) if once else 0.0
    # A tiny text can give 0 (then an unseen pair is impossible) or 1 (then a pair seen once counts for nothing).
    return min(max(estimate, 0.05), 0.95)
