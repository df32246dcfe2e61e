"""SwiGLU of sorted rows in float32 on a CPU, a slot at a time: from one matmul to the next its rows stay in cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

_silu_backward = torch.ops.aten.silu_backward.grad_input


def swiglu(x_MD: Tensor, gate_up_SHD: Tensor, down_SDF: Tensor, ends: list[int]) -> Tensor:
    """(M, D) rows by slot, H = 2F -> (M, D) down(silu(gate(x)) * up(x)), zero past the last slot's end."""
    return _SwiGLU.apply(x_MD, gate_up_SHD, down_SDF, _sizes(x_MD, ends))  # pyright: ignore[reportReturnType]


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
