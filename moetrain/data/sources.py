"""Raw text in files: finds txt, jsonl and parquet inputs and reads them as a stream that can start again anywhere."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from moetrain.config import UserError

PIECE_BYTES = 1 << 18
"""A plain-text file is read in pieces of about this size; small enough to keep all cores busy with one large file."""

_JSONL = (".jsonl", ".ndjson", ".json")
_FOLDER_TEXT = (".txt", ".md", ".rst", ".py")
_UNSUPPORTED = (".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".lz4")


@dataclass(frozen=True)
class Source:
    """One input file. ``name`` is its stable identity (relative to the folder that was given)."""

    path: Path
    name: str
    kind: str  # "text", "jsonl" or "parquet"
    compressed: bool
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Place:
    """Where reading goes on: a byte offset (a row, in parquet) and the number of the line that starts there."""

    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Piece:
    """Text of one document, or a part of it. ``key`` decides which split the document belongs to."""

    text: str
    key: bytes
    ends_document: bool
    after: Place
    read_bytes: int  # of the file on disk, so far: for progress only


def find_sources(inputs: list[str]) -> list[Source]:
    """The files that ``inputs`` (files, folders, globs) name, each once, in a fixed order; ``UserError`` if none."""
    found: dict[Path, Source] = {}
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = [(f, f.relative_to(path).as_posix()) for f in sorted(path.rglob("*")) if _belongs(f, path)]
            expected = f"a folder gives its {', '.join((*_FOLDER_TEXT, *_JSONL))} (also .gz) and .parquet files"
        elif path.exists() or path.is_symlink():
            files, expected = [(path, path.name)], ""
        else:
            files = [(Path(f), Path(f).as_posix()) for f in sorted(glob.glob(str(path), recursive=True))]
            files = [(f, name) for f, name in files if not f.is_dir()]
            expected = "no such file or folder, and as a glob it matches nothing"
        if not files:
            raise UserError(f"input={text}: no files matched ({expected}): check the path")
        for file, name in files:
            found.setdefault(file.resolve(), _source(file, name))
    if not found:
        raise UserError("no input given: add input=FILE, a folder or a glob")
    return list(found.values())


def read_pieces(source: Source, *, field: str, start: Place) -> Iterator[Piece]:
    """The pieces of one file from ``start`` on; the cuts depend only on the bytes, not on where reading started.

    Raises ``UserError`` naming the file and the line.
    """
    if source.kind == "parquet":
        from moetrain.data import parquet  # pyarrow is optional: only an input that needs it loads it

        yield from parquet.read_rows(source, field=field, start=start)
        return
    line = start.line
    try:
        with source.path.open("rb") as raw:
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if source.compressed else raw
            file.seek(start.offset)
            read = _read_jsonl if source.kind == "jsonl" else _read_text
            for piece in read(file, raw, source=source, field=field, start=start):
                line = piece.after.line
                yield piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        detail = " ".join(str(e).split())
        raise UserError(f"{source.path} is a truncated or damaged gzip ({detail}), good up to line {line}") from e
    except OSError as e:
        raise UserError(f"cannot read {source.path}: {e.strerror or e}") from e


def _belongs(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    return not hidden and file.is_file() and suffix in (*_FOLDER_TEXT, *_JSONL, ".parquet")


def _source(file: Path, name: str) -> Source:
    suffix = file.suffix.lower()
    if suffix in _UNSUPPORTED:
        raise UserError(f"{file}: {suffix} is not read here: decompress it, or recompress it as .gz")
    compressed = suffix == ".gz"
    inner = Path(file.name[: -len(".gz")]).suffix.lower() if compressed else suffix
    kind = "jsonl" if inner in _JSONL else "parquet" if inner == ".parquet" else "text"
    try:
        stat = file.stat()
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror or e}") from e
    return Source(file, name, kind, compressed, stat.st_size, stat.st_mtime_ns)


def _read_text(file: BinaryIO, raw: BinaryIO, *, source: Source, field: str, start: Place) -> Iterator[Piece]:
    offset, line, rest, key = start.offset, start.line, b"", source.name.encode("utf-8", "surrogateescape")
    while True:
        # Always a full piece from where the last one ended, plus one byte that tells whether the file goes on.
        block = rest + file.read(PIECE_BYTES + 1 - len(rest))
        last = len(block) <= PIECE_BYTES
        cut = len(block) if last else _cut(block)
        text = _decode(block[:cut], source=source, offset=offset, line=line)
        offset, line, rest = offset + cut, line + block.count(b"\n", 0, cut), block[cut:]
        if offset:  # an empty file is no document
            yield Piece(text, key, last, Place(offset, line), raw.tell())
        if last:
            return


def _cut(block: bytes) -> int:
    if cut := block.rfind(b"\n", 0, PIECE_BYTES) + 1:
        return cut
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 4 and block[cut] & 0xC0 == 0x80:  # never inside a UTF-8 character
        cut -= 1
    return cut


def _read_jsonl(file: BinaryIO, raw: BinaryIO, *, source: Source, field: str, start: Place) -> Iterator[Piece]:
    offset = start.offset
    for line, data in enumerate(file, start=start.line):
        where = f"{source.path}:{line}"
        text = _decode(data, source=source, offset=offset, line=line)
        offset += len(data)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not a JSON line ({e})") from e
        yield document(row, where=where, field=field, after=Place(offset, line + 1), read_bytes=raw.tell())


def document(row: object, *, where: str, field: str, after: Place, read_bytes: int) -> Piece:
    """One row (a JSON object or a parquet row) as a whole document, or ``UserError``."""
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: not a JSON object but {type(row).__name__}: each line must be like {{{field!r}: ...}}"
        )
    if field not in row:
        raise UserError(f"{where}: no field {field!r} (it has {', '.join(map(repr, row)) or 'none'}): set field=")
    if not isinstance(row[field], str):
        raise UserError(f"{where}: field {field!r} is {type(row[field]).__name__}, not a string")
    try:
        key = row[field].encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: field {field!r} holds a lone surrogate, which is not text: mend that line") from e
    return Piece(row[field], key, True, after, read_bytes)


def _decode(data: bytes, *, source: Source, offset: int, line: int) -> str:
    if offset == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not text
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise UserError(
            f"{source.path}:{line}: not UTF-8 (byte 0x{data[e.start]:02x} at offset {offset + e.start}): "
            "convert the file to UTF-8 or leave it out"
        ) from e


def fingerprint(sources: list[Source]) -> list[list[object]]:
    """What must stay the same for a restart to go on: each file's path, size and time of change."""
    return [[os.fspath(s.path.resolve()), s.name, s.size, s.mtime_ns] for s in sources]
