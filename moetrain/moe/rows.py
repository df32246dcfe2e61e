"""Moving rows by index; every gradient is a gather and a sum: no index_add, no atomics, the same bits each time."""

import torch
from torch import Tensor


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
