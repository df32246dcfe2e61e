"""Any text -> a tokenized corpus: streamed in parts, so a run that was killed goes on where its last part ended.

``<output>.partial/`` holds plan.json (inputs and options), tokenizer.json and the finished parts. The texts of a part
are encoded piece by piece, so where one part ends and the next begins leaves no trace in the result.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from moetrain.config import UserError
from moetrain.data import bpe, sources
from moetrain.data.corpus import FORMAT, SPLITS, Corpus, is_whole, token_dtype, write_corpus

_BATCH_CHARACTERS = 4 << 20
_TRAIN_BYTES = 32 << 20  # of text that a new tokenizer is fitted to
_SECONDS_BETWEEN_LINES = 10.0


def tokenize(
    inputs: list[str],
    *,
    output: Path,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    field: str = "text",
    valid_fraction: float = 0.01,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
    part_bytes: int = 64 << 20,
) -> Corpus:
    """Tokenizes ``inputs`` (files, folders, globs) into the corpus folder ``output``.

    ``tokenizer`` names a tokenizer.json or a corpus whose tokenizer is used; otherwise one of ``vocab_size`` ids is
    fitted to a sample of the input. A document is held out by a hash of its text (a plain-text file: of its name), so
    copies of a document land in the same split. Raises ``UserError``; nothing it leaves behind looks whole.
    """
    output = Path(output).expanduser()
    if (tokenizer is None) == (vocab_size is None):
        raise UserError("give either tokenizer=PATH (to use one) or vocab_size=N (to train one)")
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction} is not in [0, 1): use for example 0.01")
    if output.exists() and not overwrite and is_whole(output):
        raise UserError(f"output={output} is already a whole corpus: add overwrite=true to replace it")
    if output.exists() and not is_whole(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} exists and is not a tokenized corpus: choose another folder")
    found = sources.find_sources(inputs)
    loaded = bpe.load(Path(tokenizer)) if tokenizer is not None else None
    plan = {
        "format": FORMAT,
        "inputs": sources.fingerprint(found),
        "tokenizer": hashlib.sha256(loaded.to_str().encode()).hexdigest() if loaded else None,
        "vocab_size": vocab_size,
        "field": field,
        "part_bytes": part_bytes,  # parts are numbered: those of one run must line up with those of the next
        "valid_fraction": valid_fraction,
        "tokenizers_version": tokenizers.__version__,  # another version may merge ties in another order
    }
    partial = output.with_name(output.name + ".partial")
    with _write_errors(output), _locked(partial):
        _begin(partial, plan, log=log)
        if loaded is None:
            loaded = _trained(partial, found, vocab_size=vocab_size or 0, field=field, log=log)
        parts = _write_parts(
            partial, found, loaded, field=field, valid_fraction=valid_fraction, part_bytes=part_bytes, log=log
        )
        _assemble(partial, output, loaded, parts, plan=plan, inputs=inputs, overwrite=overwrite, log=log)
        shutil.rmtree(partial)
    corpus = Corpus.open(output)
    splits = corpus.meta["splits"]
    counts = ", ".join(f"{s} {splits[s]['num_tokens']:,} tokens in {splits[s]['num_documents']:,}" for s in SPLITS)
    log(f"{output}: {counts} documents; vocabulary {corpus.vocab_size:,}")
    return corpus


@dataclass(frozen=True)
class _Part:
    """What a finished part's json says: its counts, and where in the inputs the next part starts."""

    num_tokens: dict[str, int]
    source: int
    offset: int
    line: int


def _begin(partial: Path, plan: dict[str, Any], *, log: Callable[[str], None]) -> None:
    file = partial / "plan.json"
    try:
        same = json.loads(file.read_bytes()) == json.loads(json.dumps(plan))
    except (OSError, ValueError):
        same = False
    leftovers = [f for f in partial.iterdir() if f.name != "lock"]
    if leftovers and same:
        log(f"continuing {partial}: {len(list(partial.glob('part-*.json')))} parts are done")
    elif leftovers:
        log(f"{partial}: the inputs or the options have changed since it was written: starting anew")
        for f in leftovers:
            shutil.rmtree(f) if f.is_dir() else f.unlink()
    _write_whole(file, json.dumps(plan, indent=1).encode())


def _trained(
    partial: Path, found: list[sources.Source], *, vocab_size: int, field: str, log: Callable[[str], None]
) -> Tokenizer:
    file = partial / "tokenizer.json"
    if not file.exists():
        log(f"training a tokenizer of {vocab_size:,} ids on a sample of {len(found):,} files")
        tokenizer = bpe.train(_sample(found, field=field), vocab_size=vocab_size)
        _write_whole(file, tokenizer.to_str(pretty=True).encode())
    return bpe.load(file)


def _sample(found: list[sources.Source], *, field: str) -> Iterator[str]:
    """The beginnings of all files, or of as many as fit, picked by a hash of their names."""
    quota, total = max(_TRAIN_BYTES // len(found), sources.PIECE_BYTES), 0
    for source in sorted(found, key=lambda s: hashlib.blake2b(os.fsencode(s.name)).digest()):
        taken = 0
        for piece in sources.read_pieces(source, field=field, start=sources.Place()):
            yield piece.text
            taken += len(piece.text)
            if taken >= quota:
                break
        total += taken
        if total >= _TRAIN_BYTES:
            return


def _write_parts(
    partial: Path,
    found: list[sources.Source],
    tokenizer: Tokenizer,
    *,
    field: str,
    valid_fraction: float,
    part_bytes: int,
    log: Callable[[str], None],
) -> list[_Part]:
    lengths = bpe.token_bytes(tokenizer)
    dtype, eos = token_dtype(len(lengths)), bpe.eos_id(tokenizer)
    parts = _finished_parts(partial, dtype)
    first, start = (
        (parts[-1].source, sources.Place(parts[-1].offset, parts[-1].line)) if parts else (0, sources.Place())
    )
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    batch: list[tuple[str, sources.Piece]] = []
    batched = in_part = 0

    def flush_batch() -> None:
        for (split, piece), ids in zip(
            batch, bpe.encode(tokenizer, [p.text for _, p in batch], dtype=dtype), strict=True
        ):
            tokens[split].append(np.append(ids, dtype.type(eos)) if piece.ends_document else ids)
        batch.clear()

    def close_part(source: int, place: sources.Place) -> None:
        flush_batch()
        stem, counts = f"part-{len(parts):06d}", {}
        for split in SPLITS:
            data = np.concatenate([np.empty(0, dtype), *tokens[split]])
            _write_whole(partial / f"{stem}.{split}.bin", data.tobytes())
            counts[split] = len(data)
            tokens[split].clear()
        parts.append(_Part(counts, source, place.offset, place.line))
        _write_whole(partial / f"{stem}.json", json.dumps(asdict(parts[-1])).encode())

    total = sum(s.size for s in found)
    before = sum(s.size for s in found[:first])
    with _progress(total, log) as advance:
        for index in range(first, len(found)):
            for piece in sources.read_pieces(found[index], field=field, start=start):
                split = "valid" if _held_out(piece.key, valid_fraction) else "train"
                if piece.text:  # an empty document is none
                    batch.append((split, piece))
                batched, in_part = batched + len(piece.text), in_part + len(piece.text)
                if batched >= _BATCH_CHARACTERS:
                    flush_batch()
                    batched = 0
                    advance(before + piece.read_bytes)
                if in_part >= part_bytes:
                    done = piece.ends_document and found[index].kind == "text"
                    close_part(index + done, sources.Place() if done else piece.after)
                    batched = in_part = 0
            before, start = before + found[index].size, sources.Place()
        if not parts or parts[-1].source < len(found):
            close_part(len(found), sources.Place())
        advance(total)
    return parts


def _finished_parts(partial: Path, dtype: np.dtype) -> list[_Part]:
    parts: list[_Part] = []
    while (file := partial / f"part-{len(parts):06d}.json").exists():
        part = _Part(**json.loads(file.read_bytes()))
        sizes = {split: (partial / f"part-{len(parts):06d}.{split}.bin").stat().st_size for split in SPLITS}
        if any(sizes[split] != part.num_tokens[split] * dtype.itemsize for split in SPLITS):
            break
        parts.append(part)
    return parts


def _assemble(
    partial: Path,
    output: Path,
    tokenizer: Tokenizer,
    parts: list[_Part],
    *,
    plan: dict[str, Any],
    inputs: list[str],
    overwrite: bool,
    log: Callable[[str], None],
) -> None:
    eos, dtype = bpe.eos_id(tokenizer), token_dtype(len(bpe.token_bytes(tokenizer)))
    counts = {split: sum(part.num_tokens[split] for part in parts) for split in SPLITS}
    total = sum(counts.values())
    if total == 0:
        raise UserError(f"the input is empty: {len(plan['inputs'])} files and no text in them")

    def stream(split: str) -> Iterator[np.ndarray]:
        for i in range(len(parts)):
            yield np.fromfile(partial / f"part-{i:06d}.{split}.bin", dtype=dtype)

    splits = {split: stream(split) for split in SPLITS}
    fraction = plan["valid_fraction"]
    if fraction > 0 and 0 in counts.values():
        # Too few documents for the hash to fill both splits; one book in one file is the usual case.
        kept = max(1, total - max(1, round(total * fraction)))
        log(f"too few documents to hold out whole ones: the last {total - kept:,} of {total:,} tokens are held out")
        full = "train" if counts["train"] else "valid"
        splits = {"train": _head(stream(full), kept, eos=eos), "valid": _tail(stream(full), kept)}
    source = {"kind": "tokenize", "inputs": inputs, "files": len(plan["inputs"]), "field": plan["field"]}
    source |= {"valid_fraction": fraction, "tokenizers_version": plan["tokenizers_version"]}
    staging = partial / "whole"
    write_corpus(output, staging=staging, tokenizer=tokenizer, splits=splits, source=source, overwrite=overwrite)


def _head(arrays: Iterator[np.ndarray], kept: int, *, eos: int) -> Iterator[np.ndarray]:
    for array in arrays:
        yield array[:kept]
        if len(array) >= kept:
            if array[kept - 1] != eos:  # the document that was cut ends here, too
                yield np.array([eos], dtype=array.dtype)
            return
        kept -= len(array)


def _tail(arrays: Iterator[np.ndarray], skipped: int) -> Iterator[np.ndarray]:
    for array in arrays:
        yield array[skipped:]
        skipped = max(0, skipped - len(array))


def _held_out(key: bytes, fraction: float) -> bool:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") < fraction * 2.0**64


def _write_whole(file: Path, data: bytes) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(file)


@contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:  # reading errors are UserErrors by now
        raise UserError(f"cannot write {output}: {e.strerror or e}; run it again to go on from the last part") from e


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Two runs must not write the same parts; the lock goes away with the process, however that ends."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(f"another process is writing {partial}: wait for it, or choose another output=") from e
        yield


@contextmanager
def _progress(total: int, log: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line every few seconds; yields a function of the bytes read so far."""
    if sys.stderr.isatty():
        columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    last = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log(f"tokenizing: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB read")

    yield advance
