"""Saving: every rank describes its boxes, rank 0 plans who writes what, ranks write and sync, rank 0 commits."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.checkpoint.boxes import Box, untiled, volume
from moetrain.checkpoint.index import Entry, File, Index, Stored, encode, file_name
from moetrain.checkpoint.life import Life, prepare, publish, refuse_committed
from moetrain.checkpoint.types import DTYPE_NAMES, DTYPES, check
from moetrain.checkpoint.wire import Wire
from moetrain.logical import Logical

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_COPY = 64 * 2**20
"""Bytes of a strided or device tensor that are copied at a time: the memory that a save needs."""
_SLAB = 4 * 2**20
"""Bytes that are summed and written at a time: small enough to be summed and copied while in the cache."""


def save(
    folder: Path, tensors: dict[str, Logical], meta: dict[str, Any], *, group: ProcessGroup | None,
    life: Life | None = None,
) -> None:  # fmt: skip
    """Writes and commits a checkpoint of all ranks of ``group`` (``None``: this process alone) as ``folder``.

    ``folder`` lies on a file system that all ranks share; its parent is made if need be. ``meta`` is rank 0's, plain
    JSON data (keys come back as strings, tuples as lists). ``life`` has to last until the commit; None where nobody
    else can be writing. A name may be known to some ranks only. Raises on every rank alike ``UserError`` if ``folder``
    is committed already, ``SupersededError`` if the life is over, ``ValueError`` if boxes do not tile their tensor;
    then nothing that could be taken for a checkpoint is left.
    """
    write(folder, make_plan(tensors, group=group), tensors, meta, group=group, life=life)


@dataclass(frozen=True)
class Plan:
    """Who writes which boxes, for as long as the ranks hold the same ones."""

    described: dict[str, Any]  # what this rank holds
    mine: list[tuple[str, int]]  # of it, what it writes: chunk i of a tensor
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)  # of all; rank 0's
    assigned: list[list[tuple[str, Box]]] = field(default_factory=list)  # to each rank; rank 0's

    def fits(self, tensors: dict[str, Logical]) -> bool:
        """Whether this rank holds what it held."""
        return self.described == _describe(tensors)


def make_plan(tensors: dict[str, Logical], *, group: ProcessGroup | None) -> Plan:
    """Collective. Raises ``ValueError`` on every rank if boxes do not tile their tensor."""
    wire, known, described = Wire(group), _Deal(), dict[str, Any]()

    def describe() -> dict[str, Any]:
        described.update(_describe(tensors))
        return described

    write = wire.together(describe, known.deal)
    held = [(name, i) for name, logical in tensors.items() for i in range(len(logical.chunks))]
    return Plan(described, [held[at] for at in write[wire.rank]], known.shapes, known.assigned)


def write(
    folder: Path, plan: Plan, tensors: dict[str, Logical], meta: dict[str, Any], *, group: ProcessGroup | None,
    life: Life | None = None,
) -> None:  # fmt: skip
    """The rest of ``save``, collective, by any thread; of ``tensors`` only what ``plan`` says is touched."""
    wire = Wire(group)
    lead = _Lead(folder, meta, life, plan)
    try:
        prepared = wire.decide(lead.begin)
        path = folder.parent / prepared / file_name(wire.rank)
        wire.together(lambda: _write(path, plan.mine, tensors), lead.commit)
    except BaseException as error:
        lead.clean()
        if life is not None and isinstance(error, Exception) and not life.lasts:
            raise life.superseded() from error
        raise


class _Deal:
    """Rank 0's decision who writes what."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.assigned: list[list[tuple[str, Box]]] = []

    def deal(self, ranks: list[dict[str, Any]]) -> list[list[int]]:
        """Descriptions -> the positions, in each rank's description, that it writes."""
        holders = self._holders(ranks)
        for name, (shape, _) in self.shapes.items():
            if complaint := untiled(shape, list(holders[name])):
                raise ValueError(f"{name} {list(shape)} cannot be saved: {complaint}")
        write: list[list[int]] = [[] for _ in ranks]
        self.assigned = [[] for _ in ranks]
        load = [0] * len(ranks)
        boxes = [(name, box, by_rank) for name in holders for box, by_rank in holders[name].items()]
        # Boxes with one holder first: those with several then even out what the ranks have to write.
        for name, box, by_rank in sorted(boxes, key=lambda item: len(item[2])):
            rank = min(by_rank, key=lambda rank: load[rank])
            load[rank] += volume(box) * self.shapes[name][1].itemsize
            write[rank].append(by_rank[rank])
            self.assigned[rank].append((name, box))
        return write

    def _holders(self, ranks: list[dict[str, Any]]) -> dict[str, dict[Box, dict[int, int]]]:
        """Name -> non-empty box -> rank -> position of the box in what that rank described."""
        holders: dict[str, dict[Box, dict[int, int]]] = {}
        for rank, described in enumerate(ranks):
            position = 0
            for name, (shape, dtype, boxes) in described.items():
                here = (tuple(shape), DTYPES[dtype])
                known = self.shapes.setdefault(name, here)
                if known != here:
                    raise ValueError(f"{name} is {known} on one rank and {here} on rank {rank}")
                of_name = holders.setdefault(name, {})
                for offsets, sizes in boxes:
                    if 0 not in sizes:
                        of_name.setdefault((tuple(offsets), tuple(sizes)), {}).setdefault(rank, position)
                    position += 1
        return holders


class _Lead:
    """What rank 0 remembers between the decisions of one save."""

    def __init__(self, folder: Path, meta: dict[str, Any], life: Life | None, plan: Plan) -> None:
        self.folder = folder
        self.meta = meta
        self.life = life
        self.plan = plan
        self.prepared: Path | None = None

    def begin(self) -> str:
        """The folder to write in, from the root."""
        json.dumps(self.meta)  # raises here, before anything is written
        refuse_committed(self.folder)
        self.prepared = prepare(self.folder, self.life)
        return str(self.prepared.relative_to(self.folder.parent))

    def commit(self, ranks: list[dict[str, Any]]) -> None:
        """What the ranks wrote -> the index, the rename, the marker."""
        assert self.prepared is not None
        files: list[File] = []
        stored: dict[str, list[Stored]] = {name: [] for name in self.plan.shapes}
        for rank, (wrote, assigned) in enumerate(zip(ranks, self.plan.assigned, strict=True)):
            if not assigned:
                continue
            path = self.prepared / file_name(rank)
            if not path.is_file() or path.stat().st_size != wrote["bytes"]:
                raise RuntimeError(f"rank 0 does not see what rank {rank} wrote: is {path.parent} on a shared disk?")
            for (name, box), place in zip(assigned, wrote["places"], strict=True):
                stored[name].append(Stored(box, len(files), *place))
            files.append(File(path.name, wrote["bytes"], wrote["header"]))
        tensors = {
            name: Entry(shape, dtype, tuple(sorted(stored[name], key=lambda s: s.box)))
            for name, (shape, dtype) in self.plan.shapes.items()
        }
        publish(self.prepared, self.folder, index=encode(Index(self.meta, tuple(files), tensors)), life=self.life)

    def clean(self) -> None:
        if self.prepared is not None:
            shutil.rmtree(self.prepared, ignore_errors=True)


def _describe(tensors: dict[str, Logical]) -> dict[str, Any]:
    described = {}
    for name, logical in tensors.items():
        check(name, logical)
        boxes = [(tuple(chunk.offsets), tuple(chunk.tensor.shape)) for chunk in logical.chunks]
        described[name] = (tuple(logical.shape), DTYPE_NAMES[logical.dtype], boxes)
    return described


def _write(path: Path, mine: list[tuple[str, int]], tensors: dict[str, Logical]) -> dict[str, Any]:
    """Writes chunk i of tensor name, for each (name, i), as one safetensors file; returns where each lies.

    Wide types come first and the header is padded to eight bytes, so that every tensor is aligned without holes, which
    the format forbids.
    """
    if not mine:
        return {"bytes": 0, "header": 0, "places": []}
    order = sorted(range(len(mine)), key=lambda k: -tensors[mine[k][0]].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(mine)
    end = 0
    for k in order:
        name, i = mine[k]
        chunk = tensors[name].chunks[i]
        start, end = end, end + chunk.tensor.numel() * chunk.tensor.element_size()
        header[_key(name, tensors[name], i)] = {
            "dtype": _SAFETENSORS[chunk.tensor.dtype],
            "shape": tuple(chunk.tensor.shape),
            "data_offsets": (start, end),
        }
        places[k] = (start, end - start, 0)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    origin = 8 + len(text)
    with open(path, "xb", buffering=2**20) as file:
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        for k in order:
            name, i = mine[k]
            crc32 = 0
            for piece in _pieces(tensors[name].chunks[i].tensor.detach()):
                for at in range(0, len(piece), _SLAB):
                    slab = piece[at : at + _SLAB]
                    crc32 = zlib.crc32(slab, crc32)
                    file.write(slab)
            places[k] = (origin + places[k][0], places[k][1], crc32)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": origin + end, "header": zlib.crc32(head), "places": places}


def _key(name: str, logical: Logical, i: int) -> str:
    """The name of a box in the safetensors header, for people and other tools; the index does not need it."""
    chunk = logical.chunks[i]
    if tuple(chunk.tensor.shape) == tuple(logical.shape):
        return name
    spans = zip(chunk.offsets, chunk.tensor.shape, strict=True)
    return f"{name}[{','.join(f'{offset}:{offset + size}' for offset, size in spans)}]"


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, row-major: where they lie if they lie so on the CPU, else copies of at most ``_COPY``."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
    elif tensor.numel() * tensor.element_size() <= _COPY or tensor.dim() == 0:
        yield from _pieces(tensor.contiguous().cpu())
    elif tensor.shape[0] == 1:
        yield from _pieces(tensor[0])
    else:
        row = tensor[0].numel() * tensor.element_size()
        for part in tensor.split(max(1, _COPY // row)):
            yield from _pieces(part)
