"""The default corpus: the source code and documentation of the running Python's own standard library. No download."""

import fcntl
import hashlib
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.config import UserError
from moetrain.data import bpe
from moetrain.data.corpus import is_whole, token_dtype, write_corpus

RECIPE = 1
"""Part of the fingerprint; raised when the same files would give other tokens."""

_SUFFIXES = (".py", ".pyi", ".rst", ".txt", ".md")
_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")  # differ by machine, not by Python
_MAX_BYTES = 30_000_000
_HELD_OUT = 0.05
_WINDOW_LINES = 3
_BATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class _File:
    name: str  # relative to the root, with "/"
    text: bytes


def prepare(cache: Path, *, vocab_size: int, log: Callable[[str], None], root: Path | None = None) -> Path:
    """The folder of the default corpus, built in ``cache`` the first time and found there afterwards.

    Its name carries the fingerprint of the files, so another Python gives another folder. ``root`` is the library's
    folder (for tests). Safe when several processes call it at once: one builds, the others wait and use what it built.
    """
    cache, root = Path(cache).expanduser(), root or Path(sysconfig.get_path("stdlib"))
    files, num_left_out = _collect(root)
    if not files:
        raise UserError(
            f"no text files under {root}: this Python has no standard library sources; tokenize your own text"
        )
    fingerprint = _fingerprint(files)
    target = cache / f"stdlib-{fingerprint[:16]}-{vocab_size}"
    if is_whole(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"data.cache={cache} cannot be made ({e.strerror}): set it to a folder you can write") from e
    if not os.access(cache, os.W_OK):
        raise UserError(f"data.cache={cache} cannot be written: set it to a folder you can write")
    with _locked(target.with_suffix(".lock")) as alone:
        if not is_whole(target):
            for leftover in cache.glob(f"{target.name}.*.tmp") if alone else ():  # of a build that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if num_left_out:
                log(f"{root} has more than {_MAX_BYTES / 1e6:.0f} MB of text: {num_left_out} files are left out")
            _build(target, files, fingerprint=fingerprint, vocab_size=vocab_size, root=root, log=log)
    return target


def _build(
    target: Path, files: list[_File], *, fingerprint: str, vocab_size: int, root: Path, log: Callable[[str], None]
) -> None:
    splits = _split(files)
    num_bytes = sum(len(f.text) for split in splits.values() for f in split)
    counts = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    log(f"building the default corpus from {root}: {counts} files, {num_bytes / 1e6:.1f} MB; vocabulary {vocab_size:,}")
    tokenizer = bpe.train((f.text.decode() for f in splits["train"]), vocab_size=vocab_size)
    dtype, eos = token_dtype(tokenizer.get_vocab_size()), bpe.eos_id(tokenizer)

    def stream(split: list[_File]) -> Iterator[np.ndarray]:
        for batch in _batches(split):
            for ids in bpe.encode(tokenizer, [f.text.decode() for f in batch], dtype=dtype):
                yield np.append(ids, dtype.type(eos))

    source = {"kind": "stdlib", "fingerprint": fingerprint, "recipe": RECIPE, "bytes": num_bytes}
    source |= {f"{name}_files": len(split) for name, split in splits.items()}
    staging = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        tokens = {name: stream(split) for name, split in splits.items()}
        write_corpus(target, staging=staging, tokenizer=tokenizer, splits=tokens, source=source)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    log(f"built {target}")


def _collect(root: Path) -> tuple[list[_File], int]:
    """The files in a well-mixed, fixed order, and how many were left out to stay under the cap."""
    files: list[_File] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if d not in _SKIPPED_FOLDERS and not d.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            if not name.endswith(_SUFFIXES) or _SKIPPED_FILES.fullmatch(name):
                continue
            try:
                text = path.read_bytes()
                text.decode()
            except (OSError, UnicodeDecodeError):  # a dangling link; the test suite's files in other encodings
                continue
            if text.strip():
                files.append(_File(path.relative_to(root).as_posix(), text))
    files.sort(key=lambda f: _hash("order", f.name))
    kept, size = [], 0
    for file in sorted(files, key=lambda f: _hash("cap", f.name)):
        size += len(file.text)
        if size > _MAX_BYTES:
            break
        kept.append(file.name)
    chosen = set(kept)
    return [f for f in files if f.name in chosen], len(files) - len(chosen)


def _fingerprint(files: list[_File]) -> str:
    sha256 = hashlib.sha256(f"recipe {RECIPE}".encode())
    for file in sorted(files, key=lambda f: f.name):
        sha256.update(f"\0{file.name}\0{len(file.text)}\0".encode())
        sha256.update(file.text)
    return sha256.hexdigest()


def _split(files: list[_File]) -> dict[str, list[_File]]:
    """train and valid by a hash of the name, without near-duplicates.

    Held-out files come first: a later file is dropped if most of its windows of three lines were seen before, so what
    is held out is not in train under another name.
    """
    held_out = [f for f in files if _hash("held out", f.name) < _HELD_OUT * 2.0**64]
    names = {f.name for f in held_out}
    seen: set[int] = set()
    lines: dict[bytes, int] = {}

    def new(file: _File) -> bool:
        windows = _windows(file.text, lines)
        num_seen = sum(w in seen for w in windows)
        seen.update(windows)
        return num_seen * 2 <= len(windows)

    valid = [f for f in held_out if new(f)]
    train = [f for f in files if f.name not in names and new(f)]
    if not train or not valid:  # a library of a handful of files: hold out the last one
        if len(files) < 2:
            raise UserError("the default corpus needs at least two files that differ: tokenize your own text instead")
        train, valid = files[:-1], files[-1:]
    return {"train": train, "valid": valid}


def _windows(text: bytes, lines: dict[bytes, int]) -> list[int]:
    """A number per window of non-blank lines; ``lines`` numbers the lines. A collision is harmless and reproducible."""
    stripped = [line for raw in text.splitlines() if (line := raw.strip())]
    ids = np.array([lines.setdefault(line, len(lines)) for line in stripped], dtype=np.uint64)
    mixed = np.zeros(max(1, len(ids) - _WINDOW_LINES + 1), dtype=np.uint64)
    for k in range(min(_WINDOW_LINES, len(ids))):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + ids[k : k + len(mixed)] + np.uint64(1)
    return np.unique(mixed).tolist()


def _batches(files: list[_File]) -> Iterator[list[_File]]:
    batch, size = [], 0
    for file in files:
        batch.append(file)
        size += len(file.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash(*words: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(words).encode(errors="replace"), digest_size=8).digest(), "little")


@contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Waits for the lock; False on a file system without locks: then both build, and the rename decides."""
    with file.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
