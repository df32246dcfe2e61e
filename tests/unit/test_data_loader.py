"""The loader: every sample once per epoch, the same batches however they are sliced, exact shares, masks and counts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import UserError, dump, load, replace
from moetrain.data import bpe, permute
from moetrain.data.corpus import Corpus, write_corpus
from moetrain.data.loader import BLOCK, IGNORED, CorpusConfig, DataConfig, Loader, Validation, open_corpora

TOKENIZER = bpe.train(["the quick brown fox\n"] * 3, vocab_size=257)
EOS = bpe.eos_id(TOKENIZER)


def build(folder: Path, num_tokens: int, *, num_valid: int = 101, seed: int = 0, tokenizer=TOKENIZER) -> Path:
    """A corpus of random documents of 1 to 30 tokens."""
    rng = np.random.default_rng(seed)
    splits = {}
    for split, n in (("train", num_tokens), ("valid", num_valid)):
        tokens = rng.integers(1, 257, n)
        tokens[np.minimum(np.cumsum(rng.integers(1, 30, n)), n - 1)] = EOS
        splits[split] = [tokens]
    write_corpus(folder, staging=folder.with_name("staging"), tokenizer=tokenizer, splits=splits, source={})
    return folder


def config_of(paths: dict[str, Path], **options) -> DataConfig:
    weights = options.pop("weights", {})
    corpora = {name: CorpusConfig(path=str(path), weight=weights.get(name, 1.0)) for name, path in paths.items()}
    return DataConfig(corpora=corpora, **options)


def open_loader(paths: dict[str, Path], *, seq_len: int = 10, seed: int = 1, **options) -> Loader:
    cfg = config_of(paths, **options)
    return Loader(cfg, seq_len=seq_len, seed=seed, corpora=open_corpora(cfg, log=print))


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {name: build(root / name, n, seed=n) for name, n in (("big", 30_001), ("small", 1_004), ("other", 5_009))}


@settings(deadline=None)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_feistel_is_a_permutation(n, key):
    out = permute.permute(np.arange(n), n=n, key=key)
    np.testing.assert_array_equal(np.sort(out), np.arange(n))
    some = np.arange(n)[:: max(1, n // 7)]
    np.testing.assert_array_equal(permute.permute(some, n=n, key=key), out[some])


def test_feistel_mixes():
    n = 100_000
    a, b = (permute.permute(np.arange(n), n=n, key=permute.key("test", k)) for k in (0, 1))
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.02
    assert len(np.unique(np.diff(a))) > 0.5 * n


def test_order_is_pinned():
    """A changed order would silently change every resumed run: raise _ORDER_VERSION with it."""
    assert permute.key("samples", 1, "big", 0) == 2669337101759412602
    assert permute.permute(np.arange(6), n=1000, key=12345).tolist() == [507, 166, 771, 938, 560, 807]


def test_every_sample_once_per_epoch(paths):
    loader = open_loader({"small": paths["small"]})
    n = loader.num_samples["small"]
    assert n == 1003 // 10
    train = Corpus.open(paths["small"]).train
    epochs = [loader.locate(epoch * n, n)[1] for epoch in range(3)]
    for index in epochs:
        np.testing.assert_array_equal(np.sort(index), np.arange(n))
    assert (epochs[0] != epochs[1]).any()
    batch = loader.batch(n - 3, 7)
    _, index = loader.locate(n - 3, 7)
    for row, i in enumerate(index):
        np.testing.assert_array_equal(batch.tokens_BS[row], train[i * 10 : i * 10 + 10])
        np.testing.assert_array_equal(batch.targets_BS[row], train[i * 10 + 1 : i * 10 + 11])
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == batch.sample_B.dtype == torch.int64
    assert batch.sample_B.tolist() == list(range(n - 3, n + 4))
    assert batch.documents_BS is None
    assert batch.mask_BS is None


@pytest.mark.parametrize("options", [{}, {"mask_documents": True, "ignore_tokens": [5, 6]}])
def test_batches_do_not_depend_on_the_slicing(paths, options):
    whole = open_loader(paths, **options).batch(950, 120)
    other = open_loader(dict(reversed(paths.items())), **options)  # the order of the keys means nothing
    for size in (1, 7, 60):
        parts = [other.batch(950 + i, min(size, 120 - i)) for i in reversed(range(0, 120, size))][::-1]
        for name in ("tokens_BS", "targets_BS", "sample_B", "documents_BS"):
            if (expected := getattr(whole, name)) is not None:
                assert torch.equal(torch.cat([getattr(p, name) for p in parts]), expected), name
    assert open_loader(paths).batch(5, 0).tokens_BS.shape == (0, 10)


def test_shares_are_exact_in_every_block(paths):
    loader = open_loader(paths, weights={"big": 2.0, "small": 0.005, "other": 1.0})
    share = {"big": 665, "other": 333, "small": 2}  # of 665.56, 332.78 and 1.66, by largest remainder
    arrangements = []
    for block in range(3):
        corpus, _ = loader.locate(block * BLOCK, BLOCK)
        assert dict(zip(sorted(paths), np.bincount(corpus).tolist(), strict=True)) == share
        arrangements.append(corpus)
    assert (arrangements[0] != arrangements[1]).any()
    corpus, index = loader.locate(0, 3 * loader.num_samples["other"] * 3 // BLOCK * BLOCK)
    n = loader.num_samples["other"]
    drawn = index[corpus == 1]
    for epoch in range(len(drawn) // n):
        np.testing.assert_array_equal(np.sort(drawn[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_seeds_and_fingerprints(paths):
    base = open_loader(paths)
    assert base.fingerprint == open_loader(paths).fingerprint
    assert open_loader(paths, seed=7).batch(0, 9).tokens_BS.tolist() != base.batch(0, 9).tokens_BS.tolist()
    fixed = Loader(config_of(paths, seed=7), seq_len=10, seed=1, corpora=open_corpora(config_of(paths), log=print))
    assert fixed.fingerprint == open_loader(paths, seed=7).fingerprint
    others = [open_loader(paths, seed=2), open_loader(paths, seq_len=11), open_loader(paths, weights={"big": 2.0})]
    others.append(open_loader({"big": paths["big"]}))
    assert len({base.fingerprint, *(o.fingerprint for o in others)}) == 5


def test_masked_documents_and_ignored_tokens(paths):
    plain = open_loader(paths).batch(0, 50)
    loader = open_loader(paths, mask_documents=True, ignore_tokens=[7, 9])
    batch = loader.batch(0, 50)
    assert torch.equal(plain.tokens_BS, batch.tokens_BS)
    for row in range(50):
        document = 0
        for s in range(10):
            assert batch.documents_BS is not None
            assert batch.documents_BS[row, s] == document
            token, target = int(plain.tokens_BS[row, s]), int(plain.targets_BS[row, s])
            ignored = token == EOS or target in (7, 9)
            assert batch.targets_BS[row, s] == (IGNORED if ignored else target)
            document += token == EOS
    counted = int((batch.targets_BS != IGNORED).sum())
    assert loader.num_targets(0, 50) == counted < 500
    assert open_loader(paths).num_targets(0, 50) == 500
    one = loader.batch(0, 1)
    assert torch.equal(one.tokens_BS, plain.tokens_BS[:1]), "targets of a single row must not write into its tokens"


def test_validation_reads_in_order_and_pads(paths):
    corpus = Corpus.open(paths["big"])
    held_out = Validation(corpus, name="big", seq_len=10, max_samples=None)
    assert held_out.num_samples == 10
    batch = held_out.batch(8, 4)
    np.testing.assert_array_equal(batch.tokens_BS[:2].flatten(), corpus.valid[80:100])
    np.testing.assert_array_equal(batch.targets_BS[:2].flatten(), corpus.valid[81:101])
    assert batch.mask_BS is not None
    assert batch.mask_BS.all(1).tolist() == batch.mask_BS.any(1).tolist() == [True, True, False, False]
    assert (batch.targets_BS[2:] == IGNORED).all()
    assert held_out.batch(40, 2).mask_BS.sum() == 0  # pyright: ignore[reportOptionalMemberAccess]
    assert held_out.num_bytes() == corpus.token_bytes[corpus.valid[1:101]].sum()
    assert held_out.num_bytes(8, 4) == corpus.token_bytes[corpus.valid[81:101]].sum()
    assert (held_out.num_targets(), held_out.num_targets(8, 4), held_out.num_targets(40, 2)) == (100, 20, 0)
    assert Validation(corpus, name="big", seq_len=10, max_samples=3).num_samples == 3
    masked = Validation(corpus, name="big", seq_len=10, max_samples=None, mask_documents=True, ignore_tokens=(4,))
    batch = masked.batch(0, 12)
    assert batch.documents_BS is not None
    counted = batch.targets_BS[batch.targets_BS != IGNORED]
    assert masked.num_targets() == len(counted)
    assert masked.num_bytes() == corpus.token_bytes[counted].sum()


def test_user_errors(paths, tmp_path):
    stranger = build(tmp_path / "stranger", 500, tokenizer=bpe.train(["other text, text\n"] * 3, vocab_size=260))
    no_valid = build(tmp_path / "novalid", 500, num_valid=5)
    for make, message in (
        (lambda: open_loader({}), "data.corpora is empty"),
        (lambda: open_loader(paths, weights={"big": -1.0}), "big.weight=-1.0 is not a weight"),
        (lambda: open_loader(paths, weights={"big": math.nan}), "big.weight=nan is not a weight"),
        (lambda: open_loader(paths, weights=dict.fromkeys(paths, 0.0)), "every corpus of data.corpora has weight 0"),
        (lambda: open_loader(paths, weights={"small": 1e-4}), "small.weight=0.0001 is less than one sample in 1,000"),
        (
            lambda: open_loader(paths | {"new": stranger}),
            "new and data.corpora.big have different tokenizers.*tokenizer=",
        ),
        (lambda: open_loader({"a": tmp_path / "none"}), "no tokenized corpus at"),
        (lambda: open_loader(paths, seq_len=2000), "small has 1,004 tokens, one sample of seq_len=2000 needs 2,001"),
        (lambda: open_loader(paths, ignore_tokens=[257]), "ignore_tokens has 257, .*0 to 256"),
        (
            lambda: Validation(Corpus.open(no_valid), name="v", seq_len=10, max_samples=None),
            "the held-out set of v has 5 tokens.* 11: use a smaller seq_len or",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_config_round_trip():
    cfg = DataConfig(corpora={"a": CorpusConfig(path="x", weight=2)}, ignore_tokens=[1], seed=3)
    assert dump(load(dump(cfg), DataConfig)) == dump(cfg)
    assert replace(cfg, vocab_size=2048).corpora["a"].path == "x"


def test_a_corpus_of_weight_zero_is_never_drawn(paths):
    loader = open_loader(paths, weights={"big": 0.0})
    assert "big" not in loader.num_samples
    others = open_loader({name: path for name, path in paths.items() if name != "big"})
    assert torch.equal(loader.batch(5, 40).tokens_BS, others.batch(5, 40).tokens_BS)
    assert loader.fingerprint == others.fingerprint
