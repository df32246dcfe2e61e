"""The summed cross-entropy of next tokens, of logits that are there or of a chunk of them at a time. The vocabulary may
be split over a group."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm, compiling, world


def summed(
    logits_BSV: Tensor, targets_BS: Tensor, *, first_row: int = 0, group: ProcessGroup | None = None,
    compiled: bool = False,
) -> Tensor:  # fmt: skip
    """(B, S, V), (B, S) -> () summed cross-entropy in float32 or wider, targets of -100 ignored; nobody divided it.

    In a group, V is the vocabulary from ``first_row`` on, and every rank returns the whole sum. ``compiled``: on a GPU,
    alone; a CPU's own way is as fast (docs/LOG.md).
    """
    logits_TV, targets_T = logits_BSV.flatten(0, 1), targets_BS.flatten()
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    if group is not None or (logits_TV.dtype != wide and world.on_cpu(logits_TV)):
        return _CrossEntropy.apply(logits_TV, targets_T, first_row, group)  # pyright: ignore[reportReturnType]
    if compiling.active(compiled) and not world.on_cpu(logits_TV):
        return compiling.compiled(_widened)(logits_TV, targets_T)
    return _widened(logits_TV, targets_T)


def _widened(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")


def summed_of_head(x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """``summed`` of x times the weight, on a CPU in float32 or wider and alone, with few passes over the logits."""
    return _OfHead.apply(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())  # pyright: ignore[reportReturnType]


def summed_in_chunks(
    x_BSD: Tensor,
    weight_VD: Tensor,
    targets_BS: Tensor,
    *,
    real_rows: int,
    first_row: int,
    group: ProcessGroup | None,
    step: int,
) -> Tensor:
    """``summed`` of x times the weight's first ``real_rows`` rows, the logits of ``step`` tokens there at a time."""
    found = _InChunks.apply(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten(), real_rows, first_row, group, step)
    return found  # pyright: ignore[reportReturnType]


class _OfHead(torch.autograd.Function):
    """Forward turns the logits into their gradient where they lie. What backward has to multiply it by is a number for
    each token, which goes to the narrow factors and results of its two products."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        counted_T = targets_T != -100
        column_T1 = torch.where(counted_T, targets_T, 0)[:, None]
        scores_TV = x_TD @ weight_VD.t()
        torch.log_softmax(scores_TV, -1, out=scores_TV)
        loss = -torch.where(counted_T, scores_TV.gather(1, column_T1)[:, 0], 0).sum()
        scores_TV.exp_().scatter_add_(1, column_T1, scores_TV.new_full(column_T1.shape, -1))
        ctx.save_for_backward(x_TD, weight_VD, scores_TV, counted_T)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, weight_VD, slope_TV, counted_T = ctx.saved_tensors
        g_T1 = torch.where(counted_T, g, 0)[:, None]
        return (slope_TV @ weight_VD).mul_(g_T1), slope_TV.t() @ (x_TD * g_T1), None


class _CrossEntropy(torch.autograd.Function):
    """Widened a few rows at a time, on a CPU those that stay in a core's cache."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, targets_T: Tensor, first_row: int, group: ProcessGroup | None) -> Tensor:
        targets = _Targets.of(targets_T, first_row=first_row, columns=logits_TV.shape[1])
        lse_T, picked_T = _measure(logits_TV, targets)
        loss, lse_T = _total(lse_T, picked_T, targets, group)
        ctx.save_for_backward(logits_TV, *targets, lse_T)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_TV, *targets, lse_T = ctx.saved_tensors
        return _slope(logits_TV, _Targets(*targets), lse_T, g, out=torch.empty_like(logits_TV)), None, None, None


class _InChunks(torch.autograd.Function):
    """Kept are x and one number a token; backward makes the logits again. The weight's gradient adds up in float32 or
    wider and is rounded once."""

    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        real_rows: int,
        first_row: int,
        group: ProcessGroup | None,
        step: int,
    ) -> Tensor:
        weight = weight_VD[:real_rows].to(x_TD.dtype)
        targets = _Targets.of(targets_T, first_row=first_row, columns=real_rows)
        lse_T = x_TD.new_full((len(x_TD),), -torch.inf, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        picked_T = torch.zeros_like(lse_T)
        ctx.real_rows, ctx.chunks = real_rows, _slices(len(x_TD) if real_rows else 0, step)
        for chunk in ctx.chunks:
            lse_T[chunk], picked_T[chunk] = _measure(F.linear(x_TD[chunk], weight), targets.part(chunk))
        loss, lse_T = _total(lse_T, picked_T, targets, group)
        ctx.save_for_backward(x_TD, weight_VD, *targets, lse_T)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, weight_VD, *targets, lse_T = ctx.saved_tensors
        targets, weight = _Targets(*targets), weight_VD[: ctx.real_rows].to(x_TD.dtype)
        d_x_TD = torch.zeros_like(x_TD)
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        for chunk in ctx.chunks:
            x = x_TD[chunk]
            d_logits = F.linear(x, weight)
            _slope(d_logits, targets.part(chunk), lse_T[chunk], g, out=d_logits)
            torch.mm(d_logits, weight, out=d_x_TD[chunk])
            _add_product_(d_weight_VD[: ctx.real_rows], d_logits, x)
            del d_logits  # before the next chunk's are made
        return d_x_TD, d_weight_VD.to(weight_VD.dtype), *[None] * 5


class _Targets(NamedTuple):
    """Where each token's target lies among the columns of this rank."""

    column_T: Tensor  #  int64, 0 where it is elsewhere
    here_T: Tensor  #    bool
    counted_T: Tensor  # bool, False: ignored

    @classmethod
    def of(cls, targets_T: Tensor, *, first_row: int, columns: int) -> "_Targets":
        column_T = targets_T - first_row
        here_T = (column_T >= 0) & (column_T < columns)  # -100 is nowhere
        return cls(torch.where(here_T, column_T, 0), here_T, targets_T != -100)

    def part(self, rows: slice) -> "_Targets":
        return _Targets(*(x[rows] for x in self))


def _measure(logits_TV: Tensor, targets: _Targets) -> tuple[Tensor, Tensor]:
    """(T,) log-sum-exp over this rank's columns and (T,) the target's logit, 0 where that is elsewhere."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    lse_T = logits_TV.new_empty(logits_TV.shape[0], dtype=wide)
    picked_T = torch.empty_like(lse_T)
    for rows in _row_blocks(logits_TV):
        block = logits_TV[rows].to(wide)
        torch.logsumexp(block, -1, out=lse_T[rows])
        picked_T[rows] = block.gather(1, targets.column_T[rows, None])[:, 0]
    return lse_T, torch.where(targets.here_T, picked_T, 0)


def _total(lse_T: Tensor, picked_T: Tensor, targets: _Targets, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The () summed loss, and (T,) the log-sum-exp over the columns of all ranks."""
    picked_T = comm.all_reduce_(picked_T, group=group)
    if group is not None:
        most_T = comm.all_reduce_(lse_T.clone(), group=group, op=dist.ReduceOp.MAX)
        lse_T = comm.all_reduce_((lse_T - most_T).exp(), group=group).log() + most_T
    return torch.where(targets.counted_T, lse_T - picked_T, 0).sum(), lse_T


def _slope(logits_TV: Tensor, targets: _Targets, lse_T: Tensor, g: Tensor, *, out: Tensor) -> Tensor:
    """``out`` becomes the gradient by the logits, of a loss whose own gradient is ``g``; it may be the logits."""
    column_T1, g_T1 = targets.column_T[:, None], torch.where(targets.counted_T, g, 0)[:, None]
    hit_T1 = targets.here_T[:, None].to(lse_T.dtype)
    for rows in _row_blocks(logits_TV):
        block = (logits_TV[rows] - lse_T[rows, None]).exp_()
        block.scatter_(1, column_T1[rows], block.gather(1, column_T1[rows]) - hit_T1[rows])
        torch.mul(block, g_T1[rows], out=block)
        out[rows] = block
    return out


def _add_product_(sum_VD: Tensor, d_logits_TV: Tensor, x_TD: Tensor) -> None:
    """Adds d_logits^T x, rounded nowhere below the sum's dtype."""
    if x_TD.dtype == sum_VD.dtype:
        sum_VD.addmm_(d_logits_TV.t(), x_TD)
    elif not world.on_cpu(x_TD):
        sum_VD += torch.mm(d_logits_TV.t(), x_TD, out_dtype=sum_VD.dtype)
    else:
        sum_VD.addmm_(d_logits_TV.t().to(sum_VD.dtype), x_TD.to(sum_VD.dtype))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def _row_blocks(x_TV: Tensor) -> list[slice]:
    step = max(1, (2**17 if world.on_cpu(x_TV) else 2**27) // x_TV.shape[1])
    return _slices(x_TV.shape[0], step)
