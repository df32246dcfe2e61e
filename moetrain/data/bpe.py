"""Byte-level BPE with Hugging Face tokenizers: train one, load one, encode documents, count the bytes of each token."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.config import UserError

EOS = "<|eos|>"
"""Ends each document. A tokenizer made elsewhere may use one of ``_OTHER_EOS`` instead."""

_OTHER_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end_of_sentence|>")
_SMALLEST_VOCAB = 257  # every byte, and EOS


def train(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer fitted to ``texts``; the same texts give the same tokenizer.

    It holds at most ``vocab_size`` ids, fewer if the texts run out of pairs that occur twice.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise UserError(f"vocab_size={vocab_size} is below {_SMALLEST_VOCAB} (all bytes and {EOS}): use a larger one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def load(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json`` or of a corpus folder; raises ``UserError`` if there is none."""
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"tokenizer={path}: cannot read {file} ({e}): name a tokenizer.json or a corpus folder") from e
    try:
        tokenizer = _plain(Tokenizer.from_str(text))
    except Exception as e:  # the Rust side raises bare Exception
        raise UserError(f"tokenizer={path}: {file} is not a tokenizer.json ({' '.join(str(e).split())})") from e
    if _find_eos(tokenizer) is None:
        raise UserError(f"tokenizer={path}: it has no end-of-document token: add one of {EOS}, {', '.join(_OTHER_EOS)}")
    return tokenizer


def eos_id(tokenizer: Tokenizer) -> int:
    eos = _find_eos(tokenizer)
    assert eos is not None, "load() and train() only return tokenizers with an EOS"
    return eos


def encode(tokenizer: Tokenizer, texts: list[str], *, dtype: np.dtype) -> list[np.ndarray]:
    """The token ids of each text, without EOS; uses all cores."""
    return [np.array(e.ids, dtype=dtype) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int32 per id: the UTF-8 bytes a token stands for; 0 for special tokens and for ids without a token."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    spec = json.loads(tokenizer.to_str())
    special = {t["id"] for t in spec["added_tokens"] if t["special"]}
    added = {t["id"] for t in spec["added_tokens"]}
    byte_level = '"ByteLevel"' in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
    lengths = np.zeros(max(vocab.values()) + 1, dtype=np.int32)
    for token, i in vocab.items():
        if i in special:
            continue
        if byte_level and i not in added:
            lengths[i] = len(token)  # one character of the alphabet per byte
        elif len(token) == 6 and token.startswith("<0x"):
            lengths[i] = 1  # SentencePiece's byte fallback
        else:
            lengths[i] = len(token.replace("▁", " ").encode("utf-8"))
    return lengths


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    # A document that spells out "<|eos|>" must stay one document: special tokens in the text are encoded as text.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _find_eos(tokenizer: Tokenizer) -> int | None:
    found = [tokenizer.token_to_id(token) for token in (EOS, *_OTHER_EOS)]
    return next((i for i in found if i is not None), None)
