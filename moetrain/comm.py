"""Differentiable collectives, forward and backward side by side. A group of ``None`` is a rank that is alone.

    all_to_all    rows to their ranks      | rows back
    all_to_all_beside    the same, while something else is computed; in backward, while its gradients are
    gather        all-gather along a dim   | reduce-scatter     a shard becomes whole, its users' gradients are summed
    scatter_sum   reduce-scatter           | all-gather         parts of a sum become a shard of it
    all_sum       all-reduce               | all-reduce         every rank uses the sum, so each part feels all of them

These are the pairs of tensor and sequence parallelism (arXiv 1909.08053, 2205.05198), with ``all_sum`` for a statistic
that every rank goes on with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.where import here, inside

# torch 2.13 names them *_single and warns about the old names
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OfDim = Callable[[Tensor, int, ProcessGroup], Tensor]


def all_gather_into(out: Tensor, x: Tensor, *, group: ProcessGroup) -> None:
    """Every rank's ``x``, one after the other along dim 0."""
    with inside("all-gather"):
        _gather_single(out, x, group=group)


def reduce_scatter_into(
    out: Tensor, x: Tensor, *, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> None:
    """This rank's part along dim 0 of the reduced ``x``."""
    with inside("reduce-scatter"):
        _scatter_single(out, x, group=group, op=op)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, recv: list[int] | None, send: list[int] | None, group: ProcessGroup) -> Tensor:
        ctx.recv, ctx.send, ctx.group, ctx.layer = recv, send, group, here.layer
        return _exchange(x_ND, recv, send, group)

    @staticmethod
    def backward(ctx, g_MD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        here.layer = ctx.layer
        return _exchange(g_MD, ctx.send, ctx.recv, ctx.group), None, None, None


@dataclass
class _Flight:
    """An all-to-all on its way, forward or back."""

    recv: list[int] | None
    send: list[int] | None
    group: ProcessGroup
    layer: int | None
    work: dist.Work | None = None
    alive: tuple[Tensor, ...] = ()  # what it reads and writes

    def start(self, x: Tensor, recv: list[int] | None, send: list[int] | None) -> Tensor:
        out, x = _room(x, recv), x.contiguous()
        self.work = dist.all_to_all_single(out, x, recv, send, group=self.group, async_op=True)
        self.alive = out, x
        return out

    def land(self) -> None:
        if self.work is not None:
            with inside("all-to-all"):
                self.work.wait()
        self.work, self.alive = None, ()


class _Depart(torch.autograd.Function):
    """Rows set out. In backward, after ``_Arrive``: gradients have come back."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.start(x_ND, flight.recv, flight.send)
        return x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx, g_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        here.layer = ctx.flight.layer
        ctx.flight.land()
        return g_ND, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, out_MD = flight, flight.alive[0]
        flight.land()
        return out_MD

    @staticmethod
    def backward(ctx, g_MD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        flight = ctx.flight
        here.layer = flight.layer
        return flight.start(g_MD, flight.send, flight.recv), None


class _Along(torch.autograd.Function):
    """``there(x, dim, group)``, whose gradient goes ``back`` the same way."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup, there: _OfDim, back: _OfDim) -> Tensor:
        ctx.dim, ctx.group, ctx.back, ctx.layer = dim, group, back, here.layer
        return there(x, dim, group)

    @staticmethod
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        here.layer = ctx.layer
        return ctx.back(g, ctx.dim, ctx.group), None, None, None, None


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.layer = group, here.layer
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), group=group)

    @staticmethod
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        here.layer = ctx.layer
        return all_reduce_(g.clone(memory_format=torch.contiguous_format), group=ctx.group), None


def _exchange(x: Tensor, recv: list[int] | None, send: list[int] | None, group: ProcessGroup) -> Tensor:
    out = _room(x, recv)
    with inside("all-to-all"):
        dist.all_to_all_single(out, x.contiguous(), recv, send, group=group)
    return out


def _room(x: Tensor, recv: list[int] | None) -> Tensor:
    return x.new_empty(x.shape if recv is None else (sum(recv), *x.shape[1:]))


def _gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return _of_dim(all_gather_into, x, dim, x.shape[dim] * group.size(), group)


def _scattered_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return _of_dim(reduce_scatter_into, x, dim, x.shape[dim] // group.size(), group)


def _of_dim(collective, x: Tensor, dim: int, size: int, group: ProcessGroup) -> Tensor:
    """A collective of dim 0, of any dim; ``size`` is that of the result. Never a view, contiguous."""
    rest = [*x.shape[:dim], *x.shape[dim + 1 :]]
    source = x.movedim(dim, 0).contiguous()
    if all(n == 1 for n in x.shape[:dim]):
        out = x.new_empty(*x.shape[:dim], size, *x.shape[dim + 1 :])
        collective(out.view(size, *rest), source, group=group)
        return out
    out = x.new_empty(size, *rest)
    collective(out, source, group=group)
    return out.movedim(0, dim).contiguous()


def all_to_all(x_ND: Tensor, *, recv: list[int] | None, send: list[int] | None, group: ProcessGroup | None) -> Tensor:
    """(N, D) -> (M, D): rows go out in ``send`` runs, one per rank, and arrive in ``recv`` runs; None = equal runs.

    Its backward is itself with the counts exchanged.
    """
    return x_ND if group is None else _AllToAll.apply(x_ND, recv, send, group)  # pyright: ignore


def all_to_all_beside(
    x_ND: Tensor, beside: Callable[[], None], *, recv: list[int] | None, send: list[int] | None,
    group: ProcessGroup | None,
) -> Tensor:  # fmt: skip
    """``all_to_all``, with ``beside()`` called while rows are on their way. Gradients of what it records are computed
    while theirs are on their way back: autograd takes nodes in the reverse of the order in which they were made."""
    if group is None:
        beside()
        return x_ND
    flight = _Flight(recv, send, group, here.layer)
    x_ND = _Depart.apply(x_ND, flight)  # pyright: ignore
    try:
        beside()
    finally:
        x_MD = _Arrive.apply(x_ND, flight)
    return x_MD  # pyright: ignore[reportReturnType]


def start_all_to_all(
    into: Tensor, x: Tensor, *, recv: list[int], send: list[int], group: ProcessGroup | None
) -> dist.Work | None:
    """The same without gradient, on its way: rows of ``x`` into ``into``, both alive until the work is waited for."""
    if group is None:
        return None
    return dist.all_to_all_single(into, x, recv, send, group=group, async_op=True)


def gather(x: Tensor, *, dim: int, group: ProcessGroup | None) -> Tensor:
    """The group's shards of ``dim``, put together in rank order on every rank; the gradient is summed and cut."""
    return x if group is None else _Along.apply(x, dim, group, _gathered, _scattered_sum)  # pyright: ignore


def scatter_sum(x: Tensor, *, dim: int, group: ProcessGroup | None) -> Tensor:
    """This rank's shard of ``dim`` of the group's sum; the size of ``dim`` is a multiple of the group's."""
    return x if group is None else _Along.apply(x, dim, group, _scattered_sum, _gathered)  # pyright: ignore


def all_sum(x: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """The group's sum, with which every rank goes on; so the gradient is summed too."""
    return x if group is None else _AllSum.apply(x, group)  # pyright: ignore


def all_gather(x: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """(...) -> (ranks, ...) without gradient."""
    return x[None] if group is None else _gathered(x[None], 0, group)


def all_reduce_(x: Tensor, *, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """In place, without gradient; returns ``x``. Gradients and counts are SUMs: who divides is decided elsewhere."""
    if group is not None:
        with inside("all-reduce"):
            dist.all_reduce(x, op=op, group=group)
    return x


def barrier(group: ProcessGroup | None) -> None:
    if group is not None:
        with inside("barrier"):
            dist.barrier(group=group)


def size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()
