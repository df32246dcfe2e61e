"""Corpus folders: what is written is read back, and each kind of damage is one line that names file and fix."""

import json
from pathlib import Path

import numpy as np
import pytest

from moetrain.config import UserError
from moetrain.data import bpe
from moetrain.data.corpus import Corpus, is_whole, write_corpus

TOKENIZER = bpe.train(["the quick brown fox jumps over the lazy dog, again and again\n"] * 9, vocab_size=280)
TEXTS = ["the quick fox\n", "a lazy dog — ünï\n", "<|eos|> is text here"]


def build(target: Path, *, overwrite: bool = False) -> Path:
    eos = bpe.eos_id(TOKENIZER)
    arrays = [np.append(ids, eos) for ids in bpe.encode(TOKENIZER, TEXTS, dtype=np.dtype("<u2"))]
    splits = {"train": arrays[:2], "valid": arrays[2:]}
    write_corpus(
        target,
        staging=target.with_name("staging"),
        tokenizer=TOKENIZER,
        splits=splits,
        source={"kind": "test"},
        overwrite=overwrite,
    )
    return target


def test_round_trip(tmp_path):
    corpus = Corpus.open(build(tmp_path / "c"))
    corpus.verify()
    tokenizer = bpe.load(tmp_path / "c")
    documents = " ".join(map(str, corpus.train.tolist())).split(f" {corpus.eos}")
    assert tokenizer.decode([int(i) for i in documents[0].split()]) == TEXTS[0]
    assert corpus.meta["splits"]["train"]["num_bytes"] == sum(len(t.encode()) for t in TEXTS[:2])
    assert corpus.meta["splits"]["train"]["num_documents"] == 2
    assert corpus.token_bytes[corpus.valid].sum() == len(TEXTS[2].encode())
    assert (corpus.valid == corpus.eos).sum() == 1, "a document that spells out the special token stays one document"
    assert corpus.name == "c"
    assert corpus.token_bytes[corpus.eos] == 0


def test_fingerprint_is_of_the_content(tmp_path):
    first, second = Corpus.open(build(tmp_path / "a")), Corpus.open(build(tmp_path / "b"))
    assert first.fingerprint == second.fingerprint


def test_the_loser_of_a_race_keeps_the_winner(tmp_path):
    build(tmp_path / "c")
    marker = (tmp_path / "c" / "corpus.json").stat().st_ino
    build(tmp_path / "c")
    assert (tmp_path / "c" / "corpus.json").stat().st_ino == marker
    build(tmp_path / "c", overwrite=True)
    assert (tmp_path / "c" / "corpus.json").stat().st_ino != marker
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"], "nothing is left behind"


def damage(name: str, change):
    def apply(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return apply


def edit(**changes):
    return damage("corpus.json", lambda data: json.dumps(json.loads(data) | changes).encode())


def drop(key: str):
    return damage("corpus.json", lambda d: json.dumps({k: v for k, v in json.loads(d).items() if k != key}).encode())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "corpus.json").unlink(), r"no tokenized corpus at .*moetrain data tokenize"),
        (damage("corpus.json", lambda d: d[:40]), r"corpus\.json is not readable JSON"),
        (damage("corpus.json", lambda d: b"[]"), r"corpus\.json is damaged"),
        (drop("eos"), r"corpus\.json is damaged \(at 'eos'\)"),
        (edit(format=99), r"format 99, this moetrain reads up to 1: update moetrain"),
        (damage("train.bin", lambda d: d[:-2]), r"train\.bin is truncated: \d+ bytes where corpus\.json says \d+"),
        (damage("train.bin", lambda d: d + b"\0\0"), r"train\.bin is longer than written"),
        (damage("valid.bin", lambda d: b"\xff\xff" + d[2:]), r"valid\.bin holds token id 65535 but vocab_size is \d+"),
        (lambda f: (f / "valid.bin").unlink(), r"valid\.bin is missing"),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (damage("tokenizer.json", lambda d: d + b" "), r"tokenizer\.json is not the tokenizer that made"),
        (damage("token_bytes.npy", lambda d: d[:20]), r"token_bytes\.npy is damaged"),
        (lambda f: np.save(f / "token_bytes.npy", np.zeros(3)), r"token_bytes\.npy has shape \(3,\)"),
    ],
)
def test_damage_is_named(tmp_path, harm, message):
    harm(build(tmp_path / "c"))
    with pytest.raises(UserError, match=message) as caught:
        Corpus.open(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_verify_finds_a_changed_token(tmp_path):
    damage("train.bin", lambda d: d[:4] + d[6:8] + d[6:])(build(tmp_path / "c"))
    corpus = Corpus.open(tmp_path / "c")
    with pytest.raises(UserError, match=r"train\.bin does not match its sha256"):
        corpus.verify()


def test_unfinished_corpus_says_so(tmp_path):
    (tmp_path / "c.partial").mkdir()
    with pytest.raises(UserError, match="is unfinished: run the same"):
        Corpus.open(tmp_path / "c")
    assert not is_whole(tmp_path / "c")


def test_training_a_tokenizer_is_deterministic():
    text = [f"line {i % 7} of {i % 5} and {i % 3}\n" for i in range(500)]
    first, second = (bpe.train(text, vocab_size=320).to_str() for _ in range(2))
    assert first == second


def test_tokenizer_errors(tmp_path):
    with pytest.raises(UserError, match="vocab_size=100 is below 257"):
        bpe.train(["x"], vocab_size=100)
    with pytest.raises(UserError, match="cannot read"):
        bpe.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        bpe.load(tmp_path / "bad.json")
    plain = json.loads(TOKENIZER.to_str())
    plain["added_tokens"], plain["model"]["vocab"] = [], {k: v for k, v in plain["model"]["vocab"].items() if v}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="no end-of-document token"):
        bpe.load(tmp_path / "plain.json")
