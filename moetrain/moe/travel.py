"""Experts that travel (FSSDP; Hecate, arXiv 2502.02581): to the ranks that hold a replica of them for a step, and their
gradients back.

    SparseAllGather       owners' weights -> (S, n): a row for each slot of this rank, its own first
    SparseReduceScatter   gradients of replicas -> their owners, who add them to their own in order of rank

Each is an uneven all-to-all over the grid's ranks, of gradients one for each weight, and nothing where a placement has
no replica. The gathered weights are leaves of autograd whose storage comes and goes, like FSDP2's: a backward leaves
gradients at them, which are reduced when the step says so, after a micro-batch or after the last.
"""

import math
import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as _same_version
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.moe.placement.types import Placement
from moetrain.where import inside


@dataclass(frozen=True)
class Trip:
    """What a rank sends and receives of one layer, and how the gradients that come back are added up."""

    owned: int  # experts that are its own: its first slots
    slots: int
    out: tuple[int, ...]  # which of its own goes out n-th: by rank, then by id
    send: list[int]  # how many go to each rank of the grid
    recv: list[int]  # how many come from each
    travels: bool  # whether any rank sends anything

    @classmethod
    def of(cls, placement: Placement, rank: int) -> "Trip":
        holds_RE, owner_E = placement.holds_RE, placement.owner_E
        R, E = holds_RE.shape
        away_RE = holds_RE & (owner_E != torch.arange(R)[:, None])
        own_X = (owner_E == rank).nonzero().flatten()
        away_X = away_RE[rank].nonzero().flatten()
        away_X = away_X[owner_E[away_X].argsort(stable=True)]
        wanted = torch.cat([own_X, away_X]).tolist()
        if placement.slots_of(rank) != wanted:
            raise ValueError(f"slots of rank {rank} are {placement.slots_of(rank)}: own ones, then by owner: {wanted}")
        at_E = torch.full((E,), -1).index_copy_(0, own_X, torch.arange(len(own_X)))
        sent_RX = away_RE[:, own_X]
        out = at_E[own_X].expand(R, -1)[sent_RX].tolist()
        recv = torch.bincount(owner_E[away_X], minlength=R).tolist()
        return cls(len(own_X), len(wanted), tuple(out), sent_RX.sum(1).tolist(), recv, bool(away_RE.any()))

    @cached_property
    def rounds(self) -> list[tuple[list[int], list[int]]]:
        """Of what comes back, in the order of ``out``: every expert's first copy, every one's second, ...: whose it is
        (which of the rank's own), and where it lies."""
        found: list[tuple[list[int], list[int]]] = []
        seen = [0] * self.owned
        for at, own in enumerate(self.out):
            if seen[own] == len(found):
                found.append(([], []))
            found[seen[own]][0].append(own)
            found[seen[own]][1].append(at)
            seen[own] += 1
        return found


@dataclass
class _Returning:
    """Gradients on their way to their owners."""

    own: list[Tensor]
    back: list[Tensor]  # (N, ...) what comes, of each weight; none where nobody travels
    work: list[dist.Work | None]
    away: list[Tensor]  # what goes, alive until it has gone


@dataclass(eq=False)
class Replicas:
    """A layer's experts of one rank under one placement, its own among them. Every rank of ``group`` holds one.

    ``owned``: the parameters (k, ...), one row an expert. ``dtype`` is what is computed in, and what weights travel
    in; gradients travel in ``wire`` (None: as they come, in the dtype of gradients where micro-batches were added
    up) and are added up in the dtype of the parameters' gradients.
    """

    owned: tuple[nn.Parameter, ...]
    trip: Trip
    group: ProcessGroup | None
    dtype: torch.dtype
    wire: torch.dtype | None = None
    keep: bool = False  # from first use to the step's last backward (level 2), rather than for each use (level 3)
    reduces: bool = True  # whether the gradients of the next backward go to the owners
    last: bool = True  # whether that backward is the step's last
    staged: bool = False  # in a pipeline: its stages say when a backward has ended
    before: "Replicas | None" = None  # whose backward comes next
    here: bool = False
    sent: int = 0  # bytes, by this rank
    _work: dist.Work | None = None
    _sending: Tensor | None = None
    _arrived: int = 0
    sums: list[Tensor] | None = None  # gradients of earlier micro-batches, where these are of a narrower dtype
    _returning: _Returning | None = None

    @cached_property
    def _flat(self) -> Tensor:
        """(S, n), a row for each slot; one without an expert where there are none."""
        return torch.empty(max(1, self.trip.slots), self.numbers, dtype=self.dtype, device=self.owned[0].device)

    @cached_property
    def leaves(self) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in self._views(self._flat)]
        hook = weakref.WeakMethod(self._accumulated)  # a leaf does not keep alive who keeps it
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(lambda _: None if (call := hook()) is None else call())
        return leaves

    @cached_property
    def _out(self) -> Tensor:
        return torch.tensor(self.trip.out, device=self._flat.device, dtype=torch.int64)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """(X, n) -> (X, ...) of each weight."""
        parts = flat.split([math.prod(p.shape[1:]) for p in self.owned], dim=1)
        return [part.view(-1, *p.shape[1:]) for part, p in zip(parts, self.owned, strict=True)]

    @property
    def numbers(self) -> int:
        """Of one expert on this rank."""
        return sum(math.prod(p.shape[1:]) for p in self.owned)

    @property
    def waits(self) -> bool:
        """Whether gradients are here that have not set out."""
        made = "leaves" in vars(self)
        return self.sums is not None or (made and self.leaves[0].grad is not None)

    def start(self) -> None:
        """Begin the SparseAllGather, if the experts are not here. Collective."""
        if self.here:
            return
        self.here = True
        flat, k = self._flat, self.trip.owned
        flat.untyped_storage().resize_(flat.numel() * flat.itemsize)
        with torch.no_grad(), _same_version((flat, *self.leaves)):
            for view, p in zip(self._views(flat[:k]), self.owned, strict=True):
                view.copy_(p)
            if self.trip.travels:
                self._sending = flat[:k].index_select(0, self._out)
                self.sent += self._sending.nbytes
                into = flat[k : self.trip.slots]
                self._work = comm.start_all_to_all(
                    into, self._sending, recv=self.trip.recv, send=self.trip.send, group=self.group
                )

    def ready(self) -> list[Tensor]:
        """The (S, ...) weights of all slots, gathered now if they are not here."""
        self.start()
        self._arrive()
        return self.leaves

    def used(self, y: Tensor) -> Tensor:
        """To be told the result of what the weights were used for: its backward needs them again."""
        if y.requires_grad:
            y.register_hook(self._before_backward)
        if not self.keep and torch._C._current_graph_task_id() == -1:  # else a forward in a backward, which needs them
            self.free()
        return y

    def free(self) -> None:
        if self.here:
            self._arrive()
            self._flat.untyped_storage().resize_(0)
            self.here = False

    def end_backward(self) -> None:
        """A backward of this layer has ended, gradients included."""
        if self.last or not self.keep:
            self.free()
        if self.reduces:
            self.reduce()
        else:
            self.add_up()

    def add_up(self) -> None:
        """Keep the gradients of a micro-batch, added up in the dtype of the parameters' gradients."""
        if self.dtype != self.owned[0].grad_dtype:
            found = [g.to(p.grad_dtype) for g, p in zip(self._taken(), self.owned, strict=True)]
            self.sums = found if self.sums is None else [a.add_(b) for a, b in zip(self.sums, found, strict=True)]

    def reduce(self) -> None:
        """Begin the SparseReduceScatter of all gradients so far, when those of an earlier micro-batch are there."""
        self.finish()
        if not self.waits:
            return
        if self.sums is not None:
            self.add_up()
            found, self.sums = self.sums, None
        else:
            found = self._taken()
        k, slots, trip = self.trip.owned, self.trip.slots, self.trip
        # parts of what lies there, not copies, unless that kept alive what has gone: for longer, or beside a cast of it
        copies = slots > k and (self.wire is not None or not self.last)
        own = [g[:k].to(p.grad_dtype, copy=copies) for g, p in zip(found, self.owned, strict=True)]
        away = [g[k:slots].to(self.wire or g.dtype).contiguous() for g in found] if trip.travels else []
        back = [g.new_empty(len(trip.out), *g.shape[1:]) for g in away]
        self.sent += sum(g.nbytes for g in away)
        work = [
            comm.start_all_to_all(into, g, recv=trip.send, send=trip.recv, group=self.group)
            for into, g in zip(back, away, strict=True)
        ]
        self._returning = _Returning(own, back, work, away)
        if self.staged and not self.last:
            self.finish()

    def finish(self) -> None:
        """Wait for what is on its way: afterwards the parameters have their gradients."""
        trip, self._returning = self._returning, None
        if trip is None:
            return
        with inside("all-to-all of experts' gradients"):
            for work in trip.work:
                if work is not None:
                    work.wait()
        parts = [x.to(trip.own[0].dtype) for x in trip.back]
        if parts:
            for own, at in self.trip.rounds:
                for g, part in zip(trip.own, parts, strict=True):
                    torch._foreach_add_([g[i] for i in own], [part[i] for i in at])  # pyright: ignore
        for p, g in zip(self.owned, trip.own, strict=True):
            p.grad = g if p.grad is None else p.grad.add_(g)

    def _taken(self) -> list[Tensor]:
        grads = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return grads  # pyright: ignore[reportReturnType]

    def _arrive(self) -> None:
        if self._work is not None:
            with inside("all-to-all of experts"):
                self._work.wait()
            self._work = self._sending = None

    def _before_backward(self, _: Tensor) -> None:
        self.ready()
        if self.before is not None:
            self.before.start()

    def _accumulated(self) -> None:
        self._arrived = (self._arrived + 1) % len(self.owned)
        if self._arrived == 0 and not self.staged:
            self.end_backward()
