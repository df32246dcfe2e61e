"""SwiGLU of sorted rows in float32 on a CPU, a slot at a time: from one matmul to the next its rows stay in cache."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import compiling
from moetrain.kernels import activation

_silu_backward = torch.ops.aten.silu_backward.grad_input


def swiglu(x_MD: Tensor, gate_up_SHD: Tensor, down_SDF: Tensor, ends: list[int]) -> Tensor:
    """(M, D) rows by slot, H = 2F -> (M, D) down(silu(gate(x)) * up(x)), zero past the last slot's end."""
    return _SwiGLU.apply(x_MD, gate_up_SHD, down_SDF, _sizes(x_MD, ends))  # pyright: ignore[reportReturnType]


def swiglu_compiled(x_MD: Tensor, gate_up_SHD: Tensor, down_SDF: Tensor, weights_M: Tensor, ends: list[int]) -> Tensor:
    """The same times each row's weight, with one pass over memory between two matmuls."""
    return _Compiled.apply(x_MD, gate_up_SHD, down_SDF, weights_M, _sizes(x_MD, ends))  # pyright: ignore[reportReturnType]


def _sizes(x_MD: Tensor, ends: list[int]) -> list[int]:
    """Each slot's rows and those that are left."""
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return [*sizes, len(x_MD) - sum(sizes)]


class _SwiGLU(torch.autograd.Function):
    """Kept are x, gate(x) and up(x): the hidden rows are quickly made of them, again in backward."""

    @staticmethod
    def forward(ctx, x_MD: Tensor, gate_up_SHD: Tensor, down_SDF: Tensor, sizes: list[int]) -> Tensor:
        both_MH = x_MD.new_empty(len(x_MD), gate_up_SHD.shape[1])
        y_MD = torch.empty_like(x_MD)
        *slots, rest = zip(*(t.split(sizes) for t in (x_MD, both_MH, *both_MH.chunk(2, -1), y_MD)), strict=True)
        weights = zip(gate_up_SHD.transpose(1, 2), down_SDF.transpose(1, 2), strict=True)
        for (x, both, gate, up, y), (gate_up_DH, down_FD) in zip(slots, weights, strict=True):
            torch.mm(x, gate_up_DH, out=both)
            torch.mm(F.silu(gate).mul_(up), down_FD, out=y)
        rest[-1].zero_()
        ctx.save_for_backward(x_MD, gate_up_SHD, down_SDF, both_MH)
        ctx.sizes = sizes
        return y_MD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_MD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, gate_up_SHD, down_SDF, both_MH = ctx.saved_tensors
        d_x_MD, d_gate_up_SHD, d_down_SDF = (torch.empty_like(t) for t in (x_MD, gate_up_SHD, down_SDF))
        *slots, rest = zip(*(t.split(ctx.sizes) for t in (g_MD, x_MD, *both_MH.chunk(2, -1), d_x_MD)), strict=True)
        weights = zip(gate_up_SHD, down_SDF, d_gate_up_SHD, d_down_SDF, strict=True)
        for (g, x, gate, up, d_x), (gate_up_HD, down_DF, d_gate_up, d_down) in zip(slots, weights, strict=True):
            d_both = x.new_empty(len(x), gate_up_HD.shape[0])
            d_gate, d_up = d_both.chunk(2, -1)
            d_hidden, act = torch.mm(g, down_DF), F.silu(gate)
            torch.mul(d_hidden, act, out=d_up)
            torch.mm(g.t(), act.mul_(up), out=d_down)
            _silu_backward(d_hidden.mul_(up), gate, grad_input=d_gate)
            torch.mm(d_both.t(), x, out=d_gate_up)
            torch.mm(d_both, gate_up_HD, out=d_x)
        rest[-1].zero_()
        return d_x_MD, d_gate_up_SHD, d_down_SDF, None


class _Compiled(torch.autograd.Function):
    """The weight is at the hidden row, where it costs no pass of its own: the gradient of each is a by-product."""

    @staticmethod
    def forward(
        ctx, x_MD: Tensor, gate_up_SHD: Tensor, down_SDF: Tensor, weights_M: Tensor, sizes: list[int]
    ) -> Tensor:
        both_MH = x_MD.new_empty(len(x_MD), gate_up_SHD.shape[1])
        y_MD = torch.empty_like(x_MD)
        *slots, rest = zip(*(t.split(sizes) for t in (x_MD, both_MH, weights_M, y_MD)), strict=True)
        products = zip(gate_up_SHD.transpose(1, 2), down_SDF.transpose(1, 2), strict=True)
        for (x, both, weights, y), (gate_up_DH, down_FD) in zip(slots, products, strict=True):
            torch.mm(x, gate_up_DH, out=both)
            torch.mm(_fused(activation.weighted, both, weights), down_FD, out=y)
        rest[-1].zero_()
        ctx.save_for_backward(x_MD, gate_up_SHD, down_SDF, weights_M, both_MH)
        ctx.sizes = sizes
        return y_MD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_MD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, gate_up_SHD, down_SDF, weights_M, both_MH = ctx.saved_tensors
        d_x_MD, d_gate_up_SHD, d_down_SDF, d_weights_M = (
            torch.empty_like(t) for t in (x_MD, gate_up_SHD, down_SDF, weights_M)
        )
        rows = (g_MD, x_MD, both_MH, weights_M, d_x_MD, d_weights_M)
        *slots, rest = zip(*(t.split(ctx.sizes) for t in rows), strict=True)
        products = zip(gate_up_SHD, down_SDF, d_gate_up_SHD, d_down_SDF, strict=True)
        for (g, x, both, weights, d_x, d_w), (gate_up_HD, down_DF, d_gate_up, d_down) in zip(
            slots, products, strict=True
        ):
            d_both, hidden, found = _fused(activation.weighted_backward, both, torch.mm(g, down_DF), weights)
            d_w.copy_(found)
            torch.mm(g.t(), hidden, out=d_down)
            torch.mm(d_both.t(), x, out=d_gate_up)
            torch.mm(d_both, gate_up_HD, out=d_x)
        rest[-2].zero_()
        rest[-1].zero_()
        return d_x_MD, d_gate_up_SHD, d_down_SDF, d_weights_M, None


def _fused(fn: Callable, *rows: Tensor) -> Any:
    """Compiled for any number of rows: 0 and 1 are numbers apart to torch.compile."""
    if len(rows[0]) < 2:
        return fn(*rows)
    compiling.any_rows(*rows)
    return compiling.compiled(fn)(*rows)
