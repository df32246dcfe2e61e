"""Moving rows by index; every gradient is a gather and a sum: no index_add, no atomics, the same bits each time."""

import itertools

import torch
from torch import Tensor

from moetrain.kernels import routing


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, index_M: Tensor, back_NJ: Tensor, ragged: bool) -> Tensor:
        ctx.save_for_backward(index_M, back_NJ)
        ctx.ragged = ragged
        return _take(x_ND, index_M, ragged)

    @staticmethod
    def backward(ctx, g_MD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _take_sum(g_MD, ctx.saved_tensors[1], ctx.ragged), None, None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD: Tensor, index_M: Tensor, back_NJ: Tensor, ragged: bool) -> Tensor:
        ctx.save_for_backward(index_M, back_NJ)
        ctx.ragged = ragged
        return _take_sum(y_MD, back_NJ, ragged)

    @staticmethod
    def backward(ctx, g_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _take(g_ND, ctx.saved_tensors[0], ctx.ragged), None, None, None


def gather(x_ND: Tensor, index_M: Tensor, back_NJ: Tensor, *, ragged: bool = False) -> Tensor:
    """(N, D) -> (M, D): row m is ``x[index_M[m]]``, or zero where that is -1 (only if ``ragged``).

    ``back_NJ`` lists, for each row of x, the J rows m that took it (-1 = none): the gradient is their sum.
    """
    return _Gather.apply(x_ND, index_M, back_NJ, ragged)  # pyright: ignore[reportReturnType]


def gather_sum(y_MD: Tensor, index_M: Tensor, back_NJ: Tensor, *, ragged: bool = False) -> Tensor:
    """(M, D) -> (N, D): row n is the sum of ``y[back_NJ[n]]`` over J; the transpose of ``gather``."""
    return _GatherSum.apply(y_MD, index_M, back_NJ, ragged)  # pyright: ignore[reportReturnType]


def ends_on_host(offsets_S: Tensor, *, num_rows: int) -> list[int]:
    """Where each slot's rows end, of at most ``num_rows``, on the host: a sync. A dry run replaces this."""
    return offsets_S.tolist()


def counts_on_host(*counts: Tensor, num_rows: int) -> list[list[int]]:
    """Rows to and from each peer on the host, leg by leg as they travel: one sync. A dry run replaces this.

    Nobody sends more than ``num_rows``; the last of ``counts``, each (peers,) int64, is what arrives in the end.
    """
    numbers = iter(torch.cat(counts).tolist())
    return [list(itertools.islice(numbers, count.numel())) for count in counts]


def regroup(counts_RS: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows that lie by (r, s) -> by (s, r): (M,) which row comes m-th, and the inverse (M, 1).

    ``counts_RS`` says how many there are of each, ``num_rows`` how many in all, which the host has to know.
    """
    R, S = counts_RS.shape
    column_M = torch.arange(S, device=counts_RS.device).repeat(R).repeat_interleave(
        counts_RS.flatten(), output_size=num_rows
    )  # fmt: skip
    index_M = column_M.argsort(stable=True)
    return index_M, inverse(index_M)[:, None]


def sort(keys_N: Tensor, *, num_keys: int, fused: bool = False) -> tuple[Tensor, Tensor]:
    """(N,) int64 keys below ``num_keys`` -> which comes n-th, equal ones in their order, and the inverse."""
    if fused:
        return routing.order(keys_N, num_keys=num_keys)
    order_N = keys_N.argsort(stable=True)
    return order_N, inverse(order_N)


def inverse(order_N: Tensor) -> Tensor:
    """(N,) a permutation -> (N,) its inverse, with one scatter instead of a second sort."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))


def _take(x: Tensor, index: Tensor, ragged: bool) -> Tensor:
    if not ragged:
        return x.index_select(0, index)
    if x.shape[0] == 0:  # every index is -1
        return x.new_zeros(index.numel(), *x.shape[1:])
    taken = x.index_select(0, index.clamp_min(0))
    return torch.where((index >= 0).view(-1, *[1] * (x.dim() - 1)), taken, 0)  # where: 0 * NaN would be NaN


def _take_sum(y: Tensor, back_NJ: Tensor, ragged: bool) -> Tensor:
    N, J = back_NJ.shape
    if J == 2:  # the same bits as a sum over J, in fewer passes over memory
        return _take(y, back_NJ[:, 0], ragged).add_(_take(y, back_NJ[:, 1], ragged))
    taken = _take(y, back_NJ.flatten(), ragged)
    return taken if J == 1 else taken.view(N, J, *y.shape[1:]).sum(1)
