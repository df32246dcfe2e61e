"""Samples without a corpus: token ids are a hash of (seed, sample, position), so any rank makes any slice.

Frequencies fall like Zipf's, documents end at random, and rows differ in how many of their targets are counted
wherever a config ignores some: a divisor taken from one rank's rows is then a wrong one, and shows.
"""

import hashlib

import numpy as np
import torch

from moetrain import counter
from moetrain.config import UserError
from moetrain.data.loader import Batch, DataConfig, Rows
from moetrain.job import Config, Data

_DOCUMENTS = 4  # ends of documents in a row of average rate: below one a row, masks would seldom meet a boundary
_IGNORED = 0.4  # of a row's tokens, at the most, are ones that are never counted


class Synthetic:
    """Training batches, by global sample id, as ``Loader`` gives them."""

    def __init__(self, cfg: DataConfig, *, seq_len: int, vocab_size: int, seed: int) -> None:
        if vocab_size < 2:
            raise UserError(f"model.vocab_size={vocab_size}: needs at least an end of document and a token")
        self.seq_len = seq_len
        self._vocab_size, self._eos = vocab_size, vocab_size - 1
        # A smaller vocabulary than the corpus's has room for as many ignored ids, under other numbers.
        self._ignored = sorted({i % vocab_size for i in cfg.ignore_tokens})
        self._rows = Rows(seq_len, self._eos, mask_documents=cfg.mask_documents, ignore_tokens=tuple(self._ignored))
        self._seed = seed if cfg.seed is None else cfg.seed
        described = (self._seed, seq_len, vocab_size, cfg.mask_documents, self._ignored)
        self.fingerprint = hashlib.sha256(f"synthetic {described}".encode()).hexdigest()

    def batch(self, first: int, count: int) -> Batch:
        return self._rows.batch(self._tokens(first, count), first=first)

    def num_targets(self, first: int, count: int) -> int:
        return self._rows.num_targets(count, lambda: self._tokens(first, count))

    def _tokens(self, first: int, count: int) -> np.ndarray:
        """(count, S + 1) int64."""
        sample_B1 = torch.arange(first, first + count)[:, None]
        element_BS = sample_B1 * (self.seq_len + 1) + torch.arange(self.seq_len + 1)
        draw_BS = self._uniform("token", element_BS)
        tokens_BS = ((self._vocab_size + 1.0) ** draw_BS).long() - 1  # P(id) ~ log(1 + 1 / (id + 1))
        tokens_BS.clamp_(0, self._vocab_size - 1)
        if self._ignored:
            share_B1 = _IGNORED * self._uniform("ignored", sample_B1)
            which_BS = (self._uniform("which", element_BS) * len(self._ignored)).long()
            hit_BS = self._uniform("ignore", element_BS) < share_B1
            tokens_BS = torch.where(hit_BS, torch.tensor(self._ignored)[which_BS], tokens_BS)
        rate_B1 = 2 * _DOCUMENTS / (self.seq_len + 1) * self._uniform("documents", sample_B1)
        tokens_BS = torch.where(self._uniform("end", element_BS) < rate_B1, self._eos, tokens_BS)
        return tokens_BS.numpy()

    def _uniform(self, what: str, index: torch.Tensor) -> torch.Tensor:
        return counter.uniform(index, key=counter.key("synthetic", self._seed, what))


def synthetic(cfg: Config) -> Data:
    """What ``open_data`` returns, without corpora and held-out sets."""
    loader = Synthetic(cfg.data, seq_len=cfg.train.seq_len, vocab_size=cfg.model.vocab_size, seed=cfg.seed)
    return Data({}, loader, {})
