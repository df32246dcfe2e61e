"""A tokenized corpus: a folder of token files that is whole once ``corpus.json`` is in it.

    tokenizer.json   the tokenizer, as Hugging Face tokenizers writes it
    token_bytes.npy  int32 per token id: the UTF-8 bytes it stands for, 0 for special tokens
    train.bin        the tokens, raw little-endian uint16 (uint32 above 65,536 ids); each document ends with EOS
    valid.bin        the held-out tokens, alike
    corpus.json      counts, hashes and the fingerprint; written last

``write_corpus`` fills a staging folder next to the target and renames it, so nothing half-written ever looks whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moetrain.config import UserError
from moetrain.data import bpe

FORMAT = 1
SPLITS = ("train", "valid")
_SAMPLED_IDS = 4096


@dataclass(frozen=True, eq=False)
class Corpus:
    """One corpus, open for reading: memory-mapped token arrays and what ``corpus.json`` says of them."""

    path: Path
    name: str
    train: np.ndarray
    valid: np.ndarray
    vocab_size: int
    eos: int
    fingerprint: str
    tokenizer_fingerprint: str
    token_bytes: np.ndarray
    meta: dict[str, Any]

    @staticmethod
    def open(path: Path) -> "Corpus":
        """The corpus at ``path``, after the cheap checks: sizes, the tokenizer's hash, the token ids at both ends.

        Raises ``UserError`` naming the file, the rule and the fix.
        """
        path = Path(path).expanduser()
        meta = _read_meta(path)
        try:
            vocab_size, eos, dtype = int(meta["vocab_size"]), int(meta["eos"]), np.dtype(meta["dtype"])
            counts = {split: int(meta["splits"][split]["num_tokens"]) for split in SPLITS}
            fingerprint, tokenizer_sha256 = str(meta["fingerprint"]), str(meta["tokenizer_sha256"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path / 'corpus.json'} is damaged (at {e}): {_AGAIN}") from e
        tokens = {split: _map_tokens(path / f"{split}.bin", dtype, counts[split], vocab_size) for split in SPLITS}
        if hash_file(_present(path / "tokenizer.json")) != tokenizer_sha256:
            raise UserError(f"{path / 'tokenizer.json'} is not the tokenizer that made this corpus: {_AGAIN}")
        try:
            token_bytes = np.load(_present(path / "token_bytes.npy"), allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise UserError(f"{path / 'token_bytes.npy'} is damaged ({e}): {_AGAIN}") from e
        if token_bytes.shape != (vocab_size,):
            raise UserError(f"{path / 'token_bytes.npy'} has shape {token_bytes.shape}, not ({vocab_size},): {_AGAIN}")
        return Corpus(
            path=path,
            name=path.name,
            train=tokens["train"],
            valid=tokens["valid"],
            vocab_size=vocab_size,
            eos=eos,
            fingerprint=fingerprint,
            tokenizer_fingerprint=tokenizer_sha256,
            token_bytes=token_bytes,
            meta=meta,
        )

    def verify(self) -> None:
        """Reads both token files in full; raises ``UserError`` if one is not the file that was written."""
        for split in SPLITS:
            if hash_file(self.path / f"{split}.bin") != self.meta["splits"][split]["sha256"]:
                raise UserError(f"{self.path / split}.bin does not match its sha256 in corpus.json: {_AGAIN}")


def is_whole(path: Path) -> bool:
    return (path / "corpus.json").is_file()


def write_corpus(
    target: Path,
    *,
    staging: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Iterable[np.ndarray]],
    source: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes the token streams of ``splits`` as the corpus ``target``; ``staging`` must be on the same file system.

    If another process put a whole corpus at ``target`` meanwhile, that one stays (unless ``overwrite``).
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    token_bytes, eos = bpe.token_bytes(tokenizer), bpe.eos_id(tokenizer)
    tokenizer_text = tokenizer.to_str(pretty=True)
    _write_synced(staging / "tokenizer.json", tokenizer_text.encode())
    np.save(staging / "token_bytes.npy", token_bytes)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "vocab_size": len(token_bytes),
        "eos": eos,
        "dtype": token_dtype(len(token_bytes)).str,
        "splits": {
            split: _write_tokens(staging / f"{split}.bin", splits[split], token_bytes=token_bytes, eos=eos)
            for split in SPLITS
        },
        "tokenizer_sha256": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
    }
    meta["fingerprint"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    meta["source"] = source  # a description: the same tokens from elsewhere are the same corpus
    _write_synced(staging / "corpus.json", json.dumps(meta, indent=1).encode())
    _publish(staging, target, overwrite=overwrite)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


_AGAIN = (
    "build this corpus again (`moetrain data tokenize ... overwrite=true`, or delete the folder for the default one)"
)


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / "corpus.json"
    if not file.is_file():
        if path.with_name(path.name + ".partial").is_dir():
            raise UserError(
                f"the corpus {path} is unfinished: run the same `moetrain data tokenize` again to finish it"
            )
        raise UserError(
            f"no tokenized corpus at {path} (no corpus.json in it): make one with "
            f"`moetrain data tokenize input=FILES output={path}`"
        )
    try:
        meta = json.loads(file.read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{file} is not readable JSON ({' '.join(str(e).split())}): {_AGAIN}") from e
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
        raise UserError(f"{file} is damaged (no format number): {_AGAIN}")
    if meta["format"] > FORMAT:
        raise UserError(f"{file} has format {meta['format']}, this moetrain reads up to {FORMAT}: update moetrain")
    return meta


def _present(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file} is missing: {_AGAIN}")
    return file


def _map_tokens(file: Path, dtype: np.dtype, num_tokens: int, vocab_size: int) -> np.ndarray:
    size, wanted = _present(file).stat().st_size, num_tokens * dtype.itemsize
    if size != wanted:
        change = "truncated" if size < wanted else "longer than written"
        raise UserError(f"{file} is {change}: {size:,} bytes where corpus.json says {wanted:,}: {_AGAIN}")
    if num_tokens == 0:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    # A plain array over the map: slicing the memmap subclass costs more than the copy of a row.
    tokens = np.asarray(np.memmap(file, dtype=dtype, mode="r"))
    largest = max(int(tokens[:_SAMPLED_IDS].max()), int(tokens[-_SAMPLED_IDS:].max()))
    if largest >= vocab_size:
        raise UserError(f"{file} holds token id {largest} but vocab_size is {vocab_size}: {_AGAIN}")
    return tokens


def _write_tokens(file: Path, arrays: Iterable[np.ndarray], *, token_bytes: np.ndarray, eos: int) -> dict[str, Any]:
    sha256, dtype = hashlib.sha256(), token_dtype(len(token_bytes))
    num_tokens = num_documents = num_bytes = 0
    with file.open("wb") as f:
        for array in arrays:
            data = array.astype(dtype, copy=False).tobytes()
            f.write(data)
            sha256.update(data)
            num_tokens += len(array)
            num_documents += int((array == eos).sum())
            num_bytes += int(token_bytes[array].sum(dtype=np.int64))
        f.flush()
        os.fsync(f.fileno())
    return {
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "num_bytes": num_bytes,
        "sha256": sha256.hexdigest(),
    }


def _write_synced(file: Path, data: bytes) -> None:
    with file.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _publish(staging: Path, target: Path, *, overwrite: bool) -> None:
    replaced = staging.with_name(staging.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if overwrite and target.exists():
        target.rename(replaced)
    try:
        staging.rename(target)
    except OSError:
        if not is_whole(target):
            raise
        shutil.rmtree(staging)  # lost a race: the winner's corpus is the same
    shutil.rmtree(replaced, ignore_errors=True)
