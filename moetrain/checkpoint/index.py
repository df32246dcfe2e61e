"""``index.json``: what a checkpoint holds and where each box of it lies. Read as if a stranger had written it."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain import __version__
from moetrain.checkpoint.boxes import Box
from moetrain.checkpoint.folders import damaged
from moetrain.checkpoint.types import DTYPE_NAMES, DTYPES
from moetrain.config import UserError

FORMAT_VERSION = 2
"""1: files without the checksum of their header."""
_FILE = re.compile(r"rank-[0-9]{5,}\.safetensors")
_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class Stored:
    """A box of a tensor on disk: ``length`` bytes from byte ``start`` of file number ``file``, row-major."""

    box: Box
    file: int
    start: int
    length: int
    crc32: int


@dataclass(frozen=True, slots=True)
class File:
    """A data file: its size in bytes, and the checksum of its header, which is all before the first box."""

    name: str
    length: int
    header: int | None  # None: not known, format 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor on disk; its boxes tile it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Stored, ...]


@dataclass(frozen=True)
class Index:
    """A whole ``index.json``."""

    meta: dict[str, Any]
    files: tuple[File, ...]
    tensors: dict[str, Entry]


def file_name(rank: int) -> str:
    """The data file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def encode(index: Index) -> bytes:
    """``Index`` -> JSON."""
    tensors = {
        name: {
            "shape": entry.shape,
            "dtype": DTYPE_NAMES[entry.dtype],
            "boxes": [[*b.box, b.file, b.start, b.length, b.crc32] for b in entry.boxes],
        }
        for name, entry in sorted(index.tensors.items())
    }
    top = {"format_version": FORMAT_VERSION, "writer": f"moetrain {__version__}", "meta": index.meta}
    files = [[file.name, file.length, file.header] for file in index.files]
    return json.dumps(top | {"files": files, "tensors": tensors}, separators=(",", ":")).encode() + b"\n"


def decode(data: bytes, *, folder: Path) -> Index:
    """JSON -> ``Index``; raises ``UserError`` for a newer format and for anything that ``encode`` would not write."""
    try:
        top = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(folder, "index.json is not JSON") from error
    try:
        _expect(isinstance(top, dict), "not a mapping")
        version = _integer(top.get("format_version"))
        if version > FORMAT_VERSION:
            raise UserError(
                f"{folder} was written by {str(top.get('writer'))[:80]!r} in checkpoint format {version}; "
                f"moetrain {__version__} reads up to format {FORMAT_VERSION}: use a newer moetrain"
            )
        _expect(version in (1, FORMAT_VERSION), f"format_version {version}")
        meta, files, tensors = top.get("meta"), top.get("files"), top.get("tensors")
        _expect(isinstance(meta, dict), "meta is not a mapping")
        _expect(isinstance(files, list), "files is not a list")
        _expect(isinstance(tensors, dict), "tensors is not a mapping")
        known = tuple(_file(file, version) for file in files)
        return Index(meta, known, {name: _entry(name, entry, known) for name, entry in tensors.items()})
    except _BadIndex as error:
        raise damaged(folder, f"index.json: {error}") from error


class _BadIndex(Exception):
    pass


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise _BadIndex(what[:200])


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:  # bool is an int
        raise _BadIndex(f"{str(value)[:40]!r} is not a count")
    return value


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _BadIndex(f"{str(value)[:40]!r} is not a list of counts")
    return tuple(_integer(item) for item in value)


def _file(value: Any, version: int) -> File:
    _expect(
        isinstance(value, list) and len(value) == 1 + version and isinstance(value[0], str),
        f"a file is not [name, bytes{', checksum' * (version > 1)}]",
    )
    # Names are matched whole: no separators, no "..", nothing that could leave the folder.
    _expect(_FILE.fullmatch(value[0]) is not None, f"file name {value[0]!r}")
    return File(value[0], _integer(value[1]), _integer(value[2]) if version > 1 else None)


def _entry(name: str, value: Any, files: tuple[File, ...]) -> Entry:
    _expect(isinstance(value, dict), f"{name} is not a mapping")
    shape, dtype, boxes = _integers(value.get("shape")), value.get("dtype"), value.get("boxes")
    _expect(isinstance(dtype, str) and dtype in DTYPES, f"{name} has dtype {dtype!r}")
    _expect(math.prod(shape) < _LIMIT, f"{name} has shape {shape}")
    _expect(isinstance(boxes, list), f"{name} has no list of boxes")
    return Entry(shape, DTYPES[dtype], tuple(_stored(name, box, shape, DTYPES[dtype].itemsize, files) for box in boxes))


def _stored(name: str, value: Any, shape: tuple[int, ...], itemsize: int, files: tuple[File, ...]) -> Stored:
    _expect(isinstance(value, list) and len(value) == 6, f"{name}: a box is not a list of six")
    offsets, sizes = _integers(value[0]), _integers(value[1])
    _expect(
        len(offsets) == len(sizes) == len(shape)
        and all(size > 0 and offset + size <= whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)),
        f"{name}: box {offsets} + {sizes} is not inside {shape}",
    )
    file, start, length, crc32 = (_integer(item) for item in value[2:])
    _expect(file < len(files), f"{name}: there is no file {file}")
    _expect(length == math.prod(sizes) * itemsize, f"{name}: box {offsets} + {sizes} has {length} bytes")
    _expect(start + length <= files[file].length, f"{name}: a box ends behind the end of {files[file].name}")
    _expect(start % itemsize == 0, f"{name}: a box at byte {start} is not aligned")
    return Stored((offsets, sizes), file, start, length, crc32)
