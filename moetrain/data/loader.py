"""Which tokens a training step sees: samples [first, first + count) of one order that is fixed by the seed. No state.

Sample i of a corpus is the S+1 tokens from i*S on: documents are packed, and a packed row is one sequence. The order
of a corpus in an epoch is a keyed permutation (``permute.py``). The mix of several corpora is cut into blocks of 1,000
samples; each block holds every corpus's exact share, arranged by a permutation of its own. So (corpus, index) of any
sample is arithmetic: every layout, slice and resumed run sees the same batches.

Shapes: B samples, S = seq_len.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moetrain.config import UserError, config
from moetrain.data import permute, stdlib
from moetrain.data.corpus import Corpus

IGNORED = -100
"""The target that is not counted in the loss."""

BLOCK = 1000
_ORDER_VERSION = 1  # part of the fingerprint; raised when the same seed would give another order


@config
class CorpusConfig:
    """One source of the mix."""

    path: str  # "stdlib" (built on first use) or a tokenized corpus folder
    weight: float = 1.0  # its share of the samples, relative to the others'; 0: validated on only


@config
class DataConfig:
    """What is trained on, in which proportions and in which order."""

    cache: str = "~/.cache/moetrain"  # where the default corpus is built
    vocab_size: int = 4096  # of the tokenizer trained for the default corpus
    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    seed: int | None = None  # of the order of the samples; None: the run's seed
    mask_documents: bool = False  # attention stays inside a document; its first token is then no target
    ignore_tokens: list[int] = field(default_factory=list)  # token ids that are never counted as targets


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens and what to predict at each: everything a step needs to know about its samples."""

    tokens_BS: Tensor  # int64
    targets_BS: Tensor  # int64, IGNORED where nothing is to be predicted
    sample_B: Tensor  # int64, the global sample ids
    documents_BS: Tensor | None = None  # int64, the document of a token, counted from 0 in each row
    mask_BS: Tensor | None = None  # bool, False where a row is padding; None: no padding


def open_corpora(cfg: DataConfig, *, log: Callable[[str], None]) -> dict[str, Corpus]:
    """The corpora of the mix by name; builds the default one if it is asked for and missing.

    Raises ``UserError`` for a missing or damaged corpus, a weight that is none, and different tokenizers.
    """
    if not cfg.corpora:
        raise UserError("data.corpora is empty: add one, for example data=stdlib")
    for name, source in cfg.corpora.items():
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise UserError(
                f"data.corpora.{name}.weight={source.weight} is not a weight: above 0 trains on the corpus, 0 only "
                f"validates on it"
            )
    if not any(source.weight > 0 for source in cfg.corpora.values()):
        raise UserError("every corpus of data.corpora has weight 0: nothing to train on; give one a weight above 0")
    corpora: dict[str, Corpus] = {}
    for name, source in cfg.corpora.items():
        path = Path(source.path)
        if source.path == "stdlib":
            path = stdlib.prepare(Path(cfg.cache), vocab_size=cfg.vocab_size, log=log)
        corpora[name] = Corpus.open(path)
    first, *others = corpora
    for name in others:
        if corpora[name].tokenizer_fingerprint != corpora[first].tokenizer_fingerprint:
            raise UserError(
                f"data.corpora.{name} and data.corpora.{first} have different tokenizers: tokenize one of them again "
                f"with tokenizer={corpora[first].path}"
            )
    return corpora


class Samples(Protocol):
    """What a training step asks of its data."""

    @property
    def fingerprint(self) -> str:
        """Two runs with the same one see the same samples."""
        ...

    def batch(self, first: int, count: int) -> Batch:
        """Samples [first, first + count); the same for any slicing of the order."""
        ...

    def num_targets(self, first: int, count: int) -> int:
        """The counted targets of those samples."""
        ...


class Loader:
    """Training batches, by global sample id."""

    def __init__(self, cfg: DataConfig, *, seq_len: int, seed: int, corpora: dict[str, Corpus]) -> None:
        assert corpora.keys() == cfg.corpora.keys(), "corpora come from open_corpora(cfg)"
        self.seq_len = seq_len
        drawn = [name for name, source in cfg.corpora.items() if source.weight > 0]
        self._names = sorted(drawn)  # the order of the keys in a YAML file means nothing
        self._corpora = [corpora[name] for name in self._names]
        self._rows = Rows(
            seq_len, self._corpora[0].eos, mask_documents=cfg.mask_documents, ignore_tokens=tuple(cfg.ignore_tokens)
        )
        _check_ignored(cfg.ignore_tokens, self._corpora[0].vocab_size)
        self._seed = seed if cfg.seed is None else cfg.seed
        self.num_samples = {
            name: _num_samples(corpus.train, seq_len, what=f"data.corpora.{name}", fix="take a larger corpus")
            for name, corpus in zip(self._names, self._corpora, strict=True)
        }
        """The samples of each corpus in one epoch."""
        self._share = _shares({name: cfg.corpora[name].weight for name in self._names})
        self._arrangement = lru_cache(maxsize=4)(self._arrange)
        described = {
            "order": _ORDER_VERSION,
            "corpora": {name: corpora[name].fingerprint for name in self._names},
            "share": self._share.tolist(),
            "seq_len": seq_len,
            "seed": self._seed,
        }
        self.fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        """Of the corpora, weights, seq_len and seed: two runs with the same one see the same samples."""

    def batch(self, first: int, count: int) -> Batch:
        """Samples [first, first + count); the same for any slicing of the order."""
        return self._rows.batch(self._tokens(first, count), first=first)

    def num_targets(self, first: int, count: int) -> int:
        """The counted targets of those samples; reads no data if nothing is ignored."""
        return self._rows.num_targets(count, lambda: self._tokens(first, count))

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus in sorted order of the names, sample index in that corpus) of samples [first, first + count)."""
        sample_B = np.arange(first, first + count, dtype=np.int64)
        corpus_B, index_B = np.empty(count, np.int64), np.empty(count, np.int64)
        for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1 if count else 0):
            here = sample_B // BLOCK == block
            corpus_K, rank_K = self._arrangement(block)
            within = sample_B[here] - block * BLOCK
            corpus_B[here], index_B[here] = corpus_K[within], rank_K[within]
        drawn_B = (sample_B // BLOCK) * self._share[corpus_B] + index_B
        for c, name in enumerate(self._names):
            n = self.num_samples[name]
            for epoch in np.unique(drawn_B[corpus_B == c] // n):
                here = (corpus_B == c) & (drawn_B // n == epoch)
                key = permute.key("samples", self._seed, name, int(epoch))
                index_B[here] = permute.permute(drawn_B[here] % n, n=n, key=key)
        return corpus_B, index_B

    def _arrange(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a block's places: the corpus, and how many of that corpus come earlier in the block."""
        ordered = np.repeat(np.arange(len(self._share)), self._share)
        key = permute.key("block", self._seed, block)
        corpus_K = ordered[permute.permute(np.arange(BLOCK), n=BLOCK, key=key)]
        rank_K = np.empty(BLOCK, np.int64)
        for c, share in enumerate(self._share):
            rank_K[corpus_K == c] = np.arange(share)
        return corpus_K, rank_K

    def _tokens(self, first: int, count: int) -> np.ndarray:
        assert min(first, count) >= 0, f"samples [{first}, {first + count}) do not exist"
        corpus_B, index_B = self.locate(first, count)
        tokens = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row, (c, i) in enumerate(zip(corpus_B.tolist(), index_B.tolist(), strict=True)):
            tokens[row] = self._corpora[c].train[i * self.seq_len : (i + 1) * self.seq_len + 1]
        return tokens


class Validation:
    """One held-out set, read in order from its start; rows past its end are padding."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        name: str,
        seq_len: int,
        max_samples: int | None = None,
        mask_documents: bool = False,
        ignore_tokens: tuple[int, ...] = (),
    ) -> None:
        _check_ignored(ignore_tokens, corpus.vocab_size)
        self.name = name
        self.seq_len = seq_len
        self._corpus = corpus
        self._rows = Rows(seq_len, corpus.eos, mask_documents=mask_documents, ignore_tokens=ignore_tokens)
        fix = "tokenize it with a larger valid_fraction="
        available = _num_samples(corpus.valid, seq_len, what=f"the held-out set of {name}", fix=fix)
        self.num_samples = available if max_samples is None else min(available, max_samples)

    def batch(self, first: int, count: int) -> Batch:
        """Samples [first, first + count) of the set; ``mask_BS`` is False in rows past its end."""
        num_real = max(0, min(count, self.num_samples - first))
        real = self._rows.batch(self._tokens(first, num_real), first=first)
        tokens_BS = torch.full((count, self.seq_len), self._corpus.eos)
        targets_BS = torch.full((count, self.seq_len), IGNORED)
        mask_BS = torch.zeros((count, self.seq_len), dtype=torch.bool)
        tokens_BS[:num_real], targets_BS[:num_real], mask_BS[:num_real] = real.tokens_BS, real.targets_BS, True
        documents_BS = None
        if real.documents_BS is not None:
            documents_BS = torch.zeros((count, self.seq_len), dtype=torch.int64)
            documents_BS[:num_real] = real.documents_BS
        return Batch(tokens_BS, targets_BS, torch.arange(first, first + count), documents_BS, mask_BS)

    def num_targets(self, first: int = 0, count: int | None = None) -> int:
        """The counted targets of samples [first, first + count); of all by default."""
        count = self._real(first, count)
        return self._rows.num_targets(count, lambda: self._tokens(first, count))

    def num_bytes(self, first: int = 0, count: int | None = None) -> int:
        """The UTF-8 bytes that the counted targets stand for: nats / ln 2 / num_bytes is bits per byte."""
        targets_BS = self._rows.targets(self._tokens(first, self._real(first, count)))
        return int(self._corpus.token_bytes[targets_BS[targets_BS != IGNORED]].sum(dtype=np.int64))

    def _real(self, first: int, count: int | None) -> int:
        left = max(0, self.num_samples - first)
        return left if count is None else min(left, count)

    def _tokens(self, first: int, count: int) -> np.ndarray:
        start = first * self.seq_len + np.arange(count)[:, None] * self.seq_len
        return self._corpus.valid[start + np.arange(self.seq_len + 1)].astype(np.int64)


@dataclass(frozen=True)
class Rows:
    """Rows of S+1 tokens -> tokens, targets and documents; the one place that knows which targets count."""

    seq_len: int
    eos: int
    mask_documents: bool
    ignore_tokens: tuple[int, ...]

    def batch(self, tokens: np.ndarray, *, first: int) -> Batch:
        documents_BS = None
        if self.mask_documents:
            ends = tokens[:, :-1] == self.eos  # an EOS belongs to the document that it ends
            documents_BS = torch.from_numpy(np.cumsum(ends, axis=1, dtype=np.int64) - ends)
        tokens_BS = torch.from_numpy(tokens[:, :-1].copy())  # a view would be shared with the targets if B is 1
        sample_B = torch.arange(first, first + len(tokens))
        return Batch(tokens_BS, torch.from_numpy(self.targets(tokens)), sample_B, documents_BS)

    def targets(self, tokens: np.ndarray) -> np.ndarray:
        targets_BS = tokens[:, 1:].copy()
        if self.ignore_tokens:
            targets_BS[np.isin(targets_BS, self.ignore_tokens)] = IGNORED
        if self.mask_documents:  # nothing of its own document tells the first token
            targets_BS[tokens[:, :-1] == self.eos] = IGNORED
        return targets_BS

    def num_targets(self, count: int, tokens: Callable[[], np.ndarray]) -> int:
        if not self.ignore_tokens and not self.mask_documents:
            return count * self.seq_len
        return int((self.targets(tokens()) != IGNORED).sum())


def _shares(weights: dict[str, float]) -> np.ndarray:
    """int64 samples of each corpus in a block: the weights' shares of BLOCK, rounded by largest remainder."""
    exact = np.array(list(weights.values())) / sum(weights.values()) * BLOCK
    share = np.floor(exact).astype(np.int64)
    most_cut_first = np.argsort(share - exact, kind="stable")
    share[most_cut_first[: BLOCK - int(share.sum())]] += 1
    for name, samples in zip(weights, share, strict=True):
        if samples == 0:
            raise UserError(
                f"data.corpora.{name}.weight={weights[name]} is less than one sample in {BLOCK:,}: "
                f"raise it to {sum(weights.values()) / BLOCK:.3g} or remove the corpus"
            )
    return share


def _num_samples(tokens: np.ndarray, seq_len: int, *, what: str, fix: str) -> int:
    if len(tokens) < seq_len + 1:
        raise UserError(
            f"{what} has {len(tokens):,} tokens, one sample of seq_len={seq_len} needs {seq_len + 1:,}: "
            f"use a smaller seq_len or {fix}"
        )
    return (len(tokens) - 1) // seq_len


def _check_ignored(ids: list[int] | tuple[int, ...], vocab_size: int) -> None:
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"data.ignore_tokens has {i}, which is not a token id (0 to {vocab_size - 1})")
