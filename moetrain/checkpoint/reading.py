"""Loading: any rank, any boxes. Each rank maps the files, and touches only the pages that hold what it wants."""

import hashlib
import math
import mmap
import os
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.checkpoint.boxes import BoxIndex, intersection, volume, within
from moetrain.checkpoint.folders import committed_index, damaged
from moetrain.checkpoint.index import Entry, File, Index, Stored, decode
from moetrain.checkpoint.types import DTYPE_NAMES, Report, check
from moetrain.checkpoint.wire import Wire
from moetrain.config import UserError
from moetrain.logical import Logical

_SLAB = 4 * 2**20
"""Bytes that are summed at a time: small enough to be copied from the cache later."""

_CONVERTED = {torch.float32, torch.bfloat16}

Copy = tuple[Tensor, tuple[slice, ...]]
"""A view of a chunk to fill, and the part of a stored box to fill it from."""


def read_meta(folder: Path) -> dict[str, Any]:
    """The ``meta`` that was saved; raises ``UserError`` if ``folder`` is not a committed checkpoint."""
    return read(folder).meta


def read_index(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor saved; raises as ``read_meta``."""
    index = read(folder)
    return {name: (entry.shape, entry.dtype) for name, entry in index.tensors.items()}


def read(folder: Path) -> Index:
    """All that ``index.json`` says; raises as ``read_meta``."""
    return decode(committed_index(folder), folder=folder)


def check_files(folder: Path, *, group: ProcessGroup | None = None) -> None:
    """Reads every byte of ``folder`` once, each rank of ``group`` its part. Raises ``DamagedError`` on all of them
    where a file is missing, truncated or fails a checksum."""
    wire = Wire(group)
    wire.together(lambda: _check(folder, read(folder), rank=wire.rank, ranks=wire.world), lambda _: None)


def load(
    folder: Path,
    tensors: dict[str, Logical],
    *,
    group: ProcessGroup | None,
    allow_missing: Sequence[str] = (),
    convert: Collection[str] = (),
) -> Report:
    """Fills the chunks of ``tensors`` in place, under any layout; ranks of ``group`` may ask for different names.

    ``convert`` are names that may be in float32 on disk and bfloat16 here, then rounded to nearest, or the other way.

    ``allow_missing`` are names, or prefixes up to a dot or slash, that need not be on disk: their chunks are left as
    they are. Raises ``UserError`` on every rank if a tensor is missing or differs in shape or dtype, ``DamagedError``
    if a file is missing, truncated or fails a checksum, be it of a part that nobody asks for; then no chunk has been
    touched.
    """
    wire = Wire(group)
    disk: list[Index] = []
    wanted: dict[str, Logical] = {}

    def whole() -> dict[str, Any]:
        data = committed_index(folder)
        disk.append(decode(data, folder=folder))
        found, missing = _match(folder, disk[0], tensors, allow_missing, convert)
        wanted.update(found)
        _check(folder, disk[0], rank=wire.rank, ranks=wire.world)
        return {"sha256": hashlib.sha256(data).hexdigest(), "restored": list(wanted), "missing": missing}

    def report(ranks: list[dict[str, Any]]) -> dict[str, list[str]]:
        if len({rank["sha256"] for rank in ranks}) > 1:
            raise UserError(f"the ranks read different checkpoints at {folder}: is it on a shared disk?")
        restored = {name for rank in ranks for name in rank["restored"]}
        missing = {name for rank in ranks for name in rank["missing"]}
        unused = disk[0].tensors.keys() - restored
        return {"restored": sorted(restored), "missing": sorted(missing), "unused": sorted(unused)}

    names = wire.together(whole, report)
    wire.together(lambda: _fill(folder, disk[0], _plan(folder, disk[0], wanted)), lambda _: None)
    return Report(disk[0].meta, tuple(names["restored"]), tuple(names["missing"]), tuple(names["unused"]))


def _match(
    folder: Path, index: Index, tensors: dict[str, Logical], allow_missing: Sequence[str], convert: Collection[str]
) -> tuple[dict[str, Logical], list[str]]:
    """Asked for -> what is on disk, and the names that are not but need not be."""
    wanted: dict[str, Logical] = {}
    allowed: list[str] = []
    absent: list[str] = []
    for name, logical in tensors.items():
        check(name, logical)
        entry = index.tensors.get(name)
        if entry is None:
            (allowed if any(covers(prefix, name) for prefix in allow_missing) else absent).append(name)
        elif entry.shape != tuple(logical.shape) or not (
            entry.dtype == logical.dtype or (name in convert and {entry.dtype, logical.dtype} == _CONVERTED)
        ):
            raise UserError(
                f"{name} is {_text(logical.dtype, logical.shape)} here and {_text(entry.dtype, entry.shape)} in "
                f"{folder}: a checkpoint of another model"
            )
        else:
            wanted[name] = logical
    if absent:
        more = f" (nor are {len(absent) - 1} others)" if len(absent) > 1 else ""
        raise UserError(f"{absent[0]} is not in {folder}{more}: a checkpoint of another model?")
    return wanted, allowed


def covers(prefix: str, name: str) -> bool:
    """Whether ``prefix`` is that name, or the beginning of it up to a dot or slash."""
    return name == prefix or name.startswith(prefix if prefix.endswith((".", "/")) else (prefix + ".", prefix + "/"))


def _text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{DTYPE_NAMES[dtype]} {list(shape)}"


def _plan(folder: Path, index: Index, wanted: dict[str, Logical]) -> list[tuple[str, Stored, list[Copy]]]:
    """The stored boxes that this rank needs, in the order in which they lie on disk, and where their parts go."""
    plan: list[tuple[str, Stored, list[Copy]]] = []
    for name, logical in wanted.items():
        entry = index.tensors[name]
        copies: dict[int, list[Copy]] = {}
        boxes = BoxIndex([stored.box for stored in entry.boxes])
        for chunk in logical.chunks:
            here = (tuple(chunk.offsets), tuple(chunk.tensor.shape))
            if 0 in here[1]:
                continue
            found = 0
            for i in boxes.touching(here):
                there = entry.boxes[i].box
                part = intersection(there, here)
                assert part is not None
                found += volume(part)
                copies.setdefault(i, []).append((chunk.tensor.detach()[within(part, here)], within(part, there)))
            if found != volume(here):
                raise damaged(folder, f"index.json: the boxes of {name} do not tile it")
        plan += [(name, entry.boxes[i], parts) for i, parts in copies.items()]
    return sorted(plan, key=lambda read: (read[1].file, read[1].start))


def _check(folder: Path, index: Index, *, rank: int, ranks: int) -> None:
    """One rank's part of all checksums, a run of as many bytes as the others'. Raises ``DamagedError``."""
    boxes = [(stored, name) for name, entry in index.tensors.items() for stored in entry.boxes]
    parts = [(stored.file, stored.start, stored.length, stored.crc32, name) for stored, name in boxes]
    first = {i: file.length for i, file in enumerate(index.files)}
    for file, start, *_ in parts:
        first[file] = min(first[file], start)
    parts += [(i, 0, first[i], file.header, "its header") for i, file in enumerate(index.files)]
    parts.sort(key=lambda part: part[:2])
    total, before = sum(part[2] for part in parts), 0
    opened, mapped = -1, None
    for file, start, length, expected, name in parts:
        mine = before * ranks // max(1, total) == rank
        before += length
        if not mine:
            continue
        if mapped is None or file != opened:
            opened, mapped = file, _map(folder, index.files[file])
        crc32 = 0
        for at in range(start, start + length, _SLAB):
            crc32 = zlib.crc32(memoryview(mapped)[at : min(at + _SLAB, start + length)], crc32)
        if expected is not None and crc32 != expected:
            raise damaged(folder, f"{index.files[file].name} fails the checksum of {name}")


def _fill(folder: Path, index: Index, plan: list[tuple[str, Stored, list[Copy]]]) -> None:
    opened, mapped = -1, None
    for name, stored, copies in plan:
        if mapped is None or stored.file != opened:
            opened, mapped = stored.file, _map(folder, index.files[stored.file])
        _copy(mapped, stored, index.tensors[name], copies)


def _copy(mapped: mmap.mmap, stored: Stored, entry: Entry, copies: list[Copy]) -> None:
    count = math.prod(stored.box[1])
    source = torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=stored.start).view(stored.box[1])
    with torch.no_grad():
        for target, part in copies:
            target.copy_(source[part])


def _map(folder: Path, file: File) -> mmap.mmap:
    """A private map of a data file: writable for torch's sake, but nothing written to it would reach the disk."""
    name, size, path = file.name, file.length, folder / file.name
    try:
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        with open(path, "rb") as opened:
            # A map that is longer than its file kills the process when its end is touched.
            if (found := os.fstat(opened.fileno()).st_size) != size:
                raise damaged(folder, f"{name} has {found} bytes, not {size}")
            return mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(folder, f"{name} cannot be read ({error})") from error
