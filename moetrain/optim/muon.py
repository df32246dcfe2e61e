"""Muon (Jordan et al. 2024; arXiv 2502.16982): momentum, made orthogonal, of whole matrices that no rank has whole.

    M <- mu M + G                                      elementwise, where the shards are
    D = G + mu M                                       Nesterov's look ahead, likewise
    O = newton_schulz(D)                               of the whole logical matrix, on one rank
    W <- W - lr (0.2 sqrt(max(rows, cols)) O + decay W)

O does not depend on the layout: it is computed from the logical matrix, put together from its pieces without padding or
copies, each expert's gate, up and down a matrix of its own. Every matrix of a pipeline stage is computed on one of the
ranks that hold a part of it (``work.py`` deals them out by flops). Two all-to-alls a batch of matrices, one each way,
whatever cuts them: pieces of D go to who computes, pieces of the update come back to all who hold them. Between steps
a rank has its own shard of M and nothing else; in a step, its share of D and of the update on top.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.logical import Chunk, Logical
from moetrain.optim import rounding
from moetrain.optim.config import OptimConfig
from moetrain.optim.work import Batch, Piece, Trip, Unit, batches

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""The quintic a x + b x^3 + c x^5 that takes singular values to about 1 (0.68 to 1.13), small ones fastest."""
_EPS = 1e-7
"""Added to a matrix's norm: a gradient of rounding noise is not blown up to a full update."""
_RMS = 0.2
"""Of an update's elements, as AdamW's usually are (arXiv 2502.16982, section 2.2)."""
_AT_ONCE = 2**26
"""Elements that a rank computes between two all-to-alls: bounds the memory of a step, not its result."""


def newton_schulz(x_NRC: Tensor, *, steps: int) -> Tensor:
    """(N, R, C) -> N matrices with the same singular vectors and singular values near 1; rows of zeros stay zeros."""
    wide = torch.promote_types(x_NRC.dtype, torch.float32)
    norm_N11 = torch.linalg.vector_norm(x_NRC, dim=(-2, -1), keepdim=True, dtype=wide)
    x = (x_NRC / (norm_N11 + _EPS)).to(x_NRC.dtype)
    flat = x.shape[-2] > x.shape[-1]
    x = x.mT if flat else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if flat else x


def size_of_update(rows: int, cols: int) -> float:
    """What an orthogonal matrix is multiplied by, so that its elements have AdamW's usual root mean square."""
    return _RMS * max(rows, cols) ** 0.5


@dataclass(frozen=True)
class _Part:
    """A piece that this rank holds: the weights themselves, and where it lies in contiguous storage of that shape."""

    name: str
    weights: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    shape: tuple[int, ...]  # of the logical parameter
    offsets: tuple[int, ...]  # in it

    def logical(self, x: Tensor) -> Logical:
        """``x`` of the sizes of this piece lies where it lies."""
        return Logical(self.shape, x.dtype, (Chunk(self.offsets, x),))

    def of(self, storage: Tensor) -> Tensor:
        """That piece of a gradient."""
        return storage.as_strided(self.sizes, self.strides, storage.storage_offset() + self.start)


class Muon:
    """``params``: names, the same on every rank of ``group`` in the same order, -> storage that is updated in place."""

    def __init__(
        self,
        cfg: OptimConfig,
        params: dict[str, Tensor],
        *,
        describe: Callable[[str, Tensor], Logical],
        group: ProcessGroup | None,
        seed: int,
    ) -> None:
        self.cfg, self.muon, self.group, self.seed = cfg, cfg.muon, group, seed
        self.momentum = {n: torch.zeros_like(p, dtype=cfg.dtype_of_state(p.dtype)) for n, p in params.items()}
        self.params = {n: p for n, p in params.items() if not cfg.frozen(n)}  # the frozen only have state
        self.describe = describe
        self.moved()

    def replace(self, name: str, storage: Tensor) -> None:
        """From now on the parameter lies in ``storage``; then call ``moved``."""
        if name in self.params:
            self.params[name] = storage

    def moved(self) -> None:
        """Deal the work out, by who holds what. Collective."""
        params, describe = self.params, self.describe
        self.parts: dict[Piece, _Part] = {}
        self.batches: list[Batch] = []
        if not params:
            return
        for number, (name, p) in enumerate(params.items()):
            shadow = describe(name, torch.empty(p.shape, dtype=p.dtype, device="meta"))
            for chunk, like in zip(describe(name, p).chunks, shadow.chunks, strict=True):
                self._hold(number, name, chunk, like.tensor, shadow.shape)
        device = next(iter(params.values())).device
        self.batches = batches(
            _tables(list(self.parts), group=self.group, device=device),
            [_in_four(describe(name, p).shape, 1) for name, p in params.items()],
            rank=comm.rank(self.group), steps=self.muon.ns_steps, at_once=_AT_ONCE,
        )  # fmt: skip

    def _hold(self, number: int, name: str, chunk: Chunk, like: Tensor, shape: tuple[int, ...]) -> None:
        """``like``: the same box of contiguous storage that holds nothing; ``shape``: of the whole parameter."""
        offsets, sizes = _in_four(chunk.offsets, 0), _in_four(tuple(chunk.tensor.shape), 1)
        for i in range(sizes[0]):
            one = slice(i, i + 1) if like.dim() > 2 else slice(None)
            strides, start = like[one].stride(), int(like[one].storage_offset())
            at = (chunk.offsets[0] + i, *chunk.offsets[1:])
            part = _Part(name, chunk.tensor[one], tuple(like[one].shape), strides, start, shape, at)
            self.parts[number, offsets[0] + i, offsets[1:], sizes[1:]] = part

    def step(
        self, grads: dict[str, Tensor], *, lr: float, scale: Tensor | None, skip: Tensor | None = None,
        step: int | None = None,
    ) -> None:  # fmt: skip
        """Update in place with ``scale * grads``, which then hold what was made orthogonal; nothing where ``skip``."""
        mu = self.muon.momentum
        decay = self.cfg.weight_decay if self.muon.weight_decay is None else self.muon.weight_decay
        ahead: dict[str, Tensor] = {}
        for name in self.params:
            g, momentum = grads[name], self.momentum[name]
            if scale is not None:
                g.mul_(scale.to(g.dtype))
            moved = momentum.to(g.dtype, copy=True).mul_(mu).add_(g)
            momentum.copy_(moved if skip is None else torch.where(skip, momentum.to(moved.dtype), moved))
            ahead[name] = g.add_(moved, alpha=mu).contiguous()
        kept = 1 - lr * decay if skip is None else 1 - lr * decay * (1 - skip.double())
        for batch in self.batches:
            updates = self._compute(batch, self._travel(batch, batch.there, self._ahead(batch.there, ahead)))
            back = self._travel(batch, batch.back, _flat([updates[piece] for piece in batch.back.out], like=ahead))
            for piece, update in _cut(back, batch.back.into):
                part = self.parts[piece]
                update = update.view(part.weights.shape)
                update = update if skip is None else update.masked_fill(skip, 0)
                if part.weights.dtype is update.dtype:
                    part.weights.mul_(kept).add_(update, alpha=-lr)
                    continue
                assert step is not None, "which step it is decides how weights are rounded"
                moved = part.weights.to(update.dtype).mul_(kept).add_(update, alpha=-lr)
                key = rounding.key(self.seed, step, part.name)
                part.weights.copy_(rounding.rounded(moved, part.logical(moved), key=key))

    def _ahead(self, trip: Trip, ahead: dict[str, Tensor]) -> Tensor:
        parts = [self.parts[piece] for piece in trip.out]
        return _flat([part.of(ahead[part.name]) for part in parts], like=ahead)

    def _travel(self, batch: Batch, trip: Trip, x: Tensor) -> Tensor:
        group = self.group if batch.travels else None
        return comm.all_to_all(x, recv=trip.into_counts, send=trip.out_counts, group=group)

    def _compute(self, batch: Batch, flat: Tensor) -> dict[Piece, Tensor]:
        """Pieces of D -> pieces of the update, of this rank's units."""
        pieces: dict[Unit, list[tuple[Piece, Tensor]]] = {}
        for piece, values in _cut(flat, batch.there.into):
            pieces.setdefault(piece[:2], []).append((piece, values))
        updates: dict[Piece, Tensor] = {}
        dtype = flat.dtype if self.muon.ns_dtype is None else self.muon.ns_dtype.torch
        for (L, R, C), units in batch.mine.items():
            d_ULRC = flat.new_empty(len(units), L, R, C)
            for d_LRC, unit in zip(d_ULRC, units, strict=True):
                for piece, values in pieces[unit]:
                    d_LRC[_within(piece)] = values
            o_NRC = newton_schulz(d_ULRC.flatten(0, 1).to(dtype), steps=self.muon.ns_steps).to(flat.dtype)
            o_ULRC = (o_NRC * size_of_update(R, C)).view_as(d_ULRC)
            for o_LRC, unit in zip(o_ULRC, units, strict=True):
                updates |= {piece: o_LRC[_within(piece)] for piece, _ in pieces[unit]}
        return updates


def _in_four(numbers: tuple[int, ...], fill: int) -> tuple[int, int, int, int]:
    """Of (R, C), (E, R, C) or (E, L, R, C) -> of (E, L, R, C)."""
    *lead, rows, cols = numbers
    expert, of_expert = (*lead, fill, fill)[:2]
    return expert, of_expert, rows, cols


def _within(piece: Piece) -> tuple[slice, ...]:
    _, _, offsets, sizes = piece
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def _flat(tensors: list[Tensor], *, like: dict[str, Tensor]) -> Tensor:
    if not tensors:
        return next(iter(like.values())).new_empty(0)
    return torch.cat([x.reshape(-1) for x in tensors])


def _cut(flat: Tensor, pieces: tuple[Piece, ...]) -> list[tuple[Piece, Tensor]]:
    """Received values -> (piece, its values in its sizes)."""
    runs = flat.split([prod(sizes) for *_, sizes in pieces])
    return [(piece, run.view(piece[3])) for piece, run in zip(pieces, runs, strict=True)]


def _tables(mine: list[Piece], *, group: ProcessGroup | None, device: torch.device) -> list[list[Piece]]:
    """The pieces of every rank of ``group``. Two all-gathers, once in the life of a run."""
    counts = comm.all_gather(torch.tensor([len(mine)], device=device), group=group).flatten().tolist()
    rows = torch.zeros(max(counts), 8, dtype=torch.int64)
    if mine:
        rows[: len(mine)] = torch.tensor([(number, e, *offsets, *sizes) for number, e, offsets, sizes in mine])
    gathered = comm.all_gather(rows.to(device), group=group).tolist()
    return [
        [(n, e, (a, b, c), (x, y, z)) for n, e, a, b, c, x, y, z in table[:count]]
        for table, count in zip(gathered, counts, strict=True)
    ]
