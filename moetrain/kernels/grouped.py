"""Grouped GEMM through torch's own ``F.grouped_mm``, without a host sync; on a CPU slot by slot."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import compiling, deferred, world
from moetrain.kernels import slots
from moetrain.moe.rows import ends_on_host, gather, gather_sum
from moetrain.moe.types import Rows
from moetrain.rerun import rerun


def unfit(*, dtype: torch.dtype, dim: int, hidden: int) -> str | None:
    """Why ``F.grouped_mm`` cannot compute this, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"F.grouped_mm does not take {dtype}"
    multiple = 16 // dtype.itemsize  # its strides have to be multiples of 16 bytes, on CPUs too
    if dim % multiple or hidden % multiple:
        return f"F.grouped_mm needs widths that are multiples of {multiple} in {dtype} (dim {dim}, hidden {hidden})"
    return None


def _grouped_mm(x_MI: Tensor, w_SOI: Tensor, offsets_S: Tensor) -> Tensor:
    """(M, I) rows by slot, (S, O, I) "out, in" -> (M, O)."""
    if x_MI.dtype in (torch.bfloat16, torch.float16) and world.on_cpu(x_MI):
        ends = ends_on_host(offsets_S, num_rows=x_MI.shape[0])
        return deferred.product(
            x_MI, w_SOI,
            y=lambda x, w: _RoundedRows.apply(x, w, ends),  # pyright: ignore[reportArgumentType]
            d_x=lambda g, w: by_slot(g, w, ends), d_w=lambda g, x: weights_by_slot(g, x, ends),
        )  # fmt: skip
    return deferred.product(
        x_MI, w_SOI,
        y=lambda x, w: F.grouped_mm(x, w.transpose(1, 2), offs=offsets_S),
        d_x=lambda g, w: F.grouped_mm(g, w, offs=offsets_S),
        d_w=lambda g, x: F.grouped_mm(g.t(), x, offs=offsets_S),
    )  # fmt: skip


class _RoundedRows(torch.autograd.Function):
    """On a CPU, oneDNN compiles low-precision matmuls anew for every shape, which takes ten times as long as one runs,
    and a slot has another number of rows each step: round it up, so that a few compiled ones are met again and again.
    """

    @staticmethod
    def forward(ctx, x_MI: Tensor, w_SOI: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x_MI, w_SOI)
        ctx.ends = ends
        return by_slot(x_MI, w_SOI.transpose(1, 2), ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_MO: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MI, w_SOI = ctx.saved_tensors
        d_x_MI = by_slot(g_MO, w_SOI, ctx.ends) if ctx.needs_input_grad[0] else None
        return d_x_MI, weights_by_slot(g_MO, x_MI, ctx.ends) if ctx.needs_input_grad[1] else None, None


def weights_by_slot(g_MO: Tensor, x_MI: Tensor, ends: list[int]) -> Tensor:
    d_w_SOI = g_MO.new_empty(len(ends), g_MO.shape[1], x_MI.shape[1])
    for d_w, start, end in zip(d_w_SOI, [0, *ends], ends, strict=False):
        torch.mm(_padded(g_MO, start, end).t(), _padded(x_MI, start, end), out=d_w)
    return d_w_SOI


def by_slot(x_MI: Tensor, w_SIO: Tensor, ends: list[int]) -> Tensor:
    """Slots in order: what one computes past its rows, the next overwrites."""
    y_MO = x_MI.new_empty(x_MI.shape[0], w_SIO.shape[2])
    for w_IO, start, end in zip(w_SIO, [0, *ends], ends, strict=False):
        stop = start + _round_up(end - start)
        if stop <= x_MI.shape[0]:
            torch.mm(x_MI[start:stop], w_IO, out=y_MO[start:stop])
        else:
            y_MO[start:end] = (_padded(x_MI, start, end) @ w_IO)[: end - start]
    return y_MO


def _padded(x_MI: Tensor, start: int, end: int) -> Tensor:
    """Rows start..end with zeros below: a sum over rows may not see the next slot's."""
    rows = end - start
    padded = x_MI.new_empty(_round_up(rows), x_MI.shape[1])
    padded[:rows] = x_MI[start:end]
    padded[rows:] = 0
    return padded


def _round_up(rows: int) -> int:
    return -(-rows // _ROWS) * _ROWS


_ROWS = 64


def swiglu(
    rows: Rows, gate_up_S2FD: Tensor, down_SDF: Tensor, *, again: bool = False, compiled: bool = False
) -> Tensor:
    """See ``kernels/__init__.py``. The combine weight multiplies the hidden row, which is narrower than y where experts
    are many; in float32 on a CPU the result, since there no hidden row is kept. ``compiled``: what is between grouped
    matmuls."""
    x_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    gate_up_SHD = gate_up_S2FD.flatten(1, 2)
    if x_MD.dtype is torch.float32 and world.on_cpu(x_MD) and not (again or deferred.recording()):
        ends = ends_on_host(rows.offsets_S, num_rows=x_MD.shape[0])
        y_MD = slots.swiglu(x_MD, gate_up_SHD, down_SDF, ends) * rows.weights_M[:, None]
    else:
        product = partial(_grouped_mm, offsets_S=rows.offsets_S)
        y_MD = sorted_swiglu(product, x_MD, gate_up_SHD, down_SDF, rows.weights_M, again=again, compiled=compiled)
    return gather_sum(y_MD, rows.index_M, rows.back_NJ, ragged=rows.ragged)


def sorted_swiglu(
    product: Callable[..., Tensor], x_MD: Tensor, gate_up: Tensor, down: Tensor, weights_M: Tensor, *, again: bool,
    compiled: bool = False,
) -> Tensor:  # fmt: skip
    """Of rows by slot, by a ``product`` (M, I), (S, ..., I) -> (M, O); the weight multiplies the hidden row."""
    compiled = compiling.active(compiled) and len(x_MD) > 1  # 0 and 1 are numbers apart to torch.compile
    rest = partial(_down, compiled=compiled)
    return rerun(rest, product(x_MD, gate_up), weights_M, down, product, on=again)


def _down(
    both_M2F: Tensor, weights_M: Tensor, down_SDF: Tensor, product: Callable[..., Tensor], *, compiled: bool
) -> Tensor:
    hidden = _hidden
    if compiled:
        compiling.any_rows(both_M2F, weights_M)
        hidden = compiling.compiled(_hidden)
    return product(hidden(both_M2F, weights_M), down_SDF)


def _hidden(both_M2F: Tensor, weights_M: Tensor) -> Tensor:
    """gate(x) and up(x) side by side -> (M, F) silu(gate(x)) * up(x) times each row's weight."""
    gate_MF, up_MF = both_M2F.chunk(2, dim=-1)
    return F.silu(gate_MF) * up_MF * weights_M[:, None].to(both_M2F.dtype)
