"""Differentiable collectives, forward and backward side by side. A group of ``None`` is a rank that is alone."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, recv: list[int] | None, send: list[int] | None, group: ProcessGroup) -> Tensor:
        ctx.recv, ctx.send, ctx.group = recv, send, group
        return _exchange(x_ND, recv, send, group)

    @staticmethod
    def backward(ctx, g_MD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(g_MD, ctx.send, ctx.recv, ctx.group), None, None, None


def _exchange(x: Tensor, recv: list[int] | None, send: list[int] | None, group: ProcessGroup) -> Tensor:
    out = torch.empty_like(x) if recv is None else x.new_empty(sum(recv), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), recv, send, group=group)
    return out


def all_to_all(x_ND: Tensor, *, recv: list[int] | None, send: list[int] | None, group: ProcessGroup | None) -> Tensor:
    """(N, D) -> (M, D): rows go out in ``send`` runs, one per rank, and arrive in ``recv`` runs; None = equal runs.

    Its backward is itself with the counts exchanged.
    """
    return x_ND if group is None else _AllToAll.apply(x_ND, recv, send, group)  # pyright: ignore


def all_reduce_(x: Tensor, *, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """In place, without gradient; returns ``x``. Gradients and counts are SUMs: who divides is decided elsewhere."""
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
    return x


def barrier(group: ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group=group)


def size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()
