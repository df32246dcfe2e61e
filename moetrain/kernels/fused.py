"""The expert layer in our own Triton kernels (``triton_gemm.py``): rows of x are gathered inside the GEMMs; kept for
backward are X, H = (gate(x), up(x)) and the routing, 2 N D + 4 M F bytes in bf16 (SonicMoE, arXiv 2512.14080)."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from moetrain import deferred, world
from moetrain.moe.types import Rows


def unfit(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int) -> str | None:
    """Why the Triton kernels cannot compute this, or None."""
    if why := unfit_at(device):
        return why
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels do not take {dtype}"
    if interpreted() and dtype is torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 as if it were integers"
    if dim % 32 or hidden % 32:
        return f"the Triton kernels need widths that are multiples of 32 (dim {dim}, hidden {hidden})"
    return None


def unfit_at(device: torch.device) -> str | None:
    """Why no Triton kernel runs on ``device``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'moetrain[gpu]')"
    if world.on_cpu(device) and not interpreted():
        return "Triton compiles for GPUs, and this is a CPU (TRITON_INTERPRET=1 interprets it, slowly)"
    return None


def unfit_float8(*, device: torch.device, tile: int, dim: int, hidden: int) -> str | None:
    """Why the Triton kernels cannot compute this in float8, or None."""
    if tile != 128 or dim % 128 or hidden % 128:
        return (
            f"the Triton kernels have float8 in tiles of 128, of widths that are multiples (dim {dim}, hidden {hidden})"
        )
    if not world.on_cpu(device) and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "float8 wants an NVIDIA GPU of compute capability 8.9 or more"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on whatever device the tensors are."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def swiglu(
    rows: Rows, gate_up_S2FD: Tensor, down_SDF: Tensor, *, again: bool = False, in_float8: bool = False
) -> Tensor:
    """See ``kernels/__init__.py``. ``again`` is so in any case."""
    weights = (gate_up_S2FD, down_SDF)
    if (
        deferred.recording() and rows.x_ND.requires_grad and all(w.requires_grad for w in weights)
    ):  # hidden from autograd, which backward then tells itself, or later
        return _SwiGLU.apply(rows.x_ND, rows.weights_M, rows, in_float8, weights)  # pyright: ignore[reportReturnType]
    return _SwiGLU.apply(rows.x_ND, rows.weights_M, rows, in_float8, None, *weights)  # pyright: ignore[reportReturnType]


def _launch(in_float8: bool) -> Any:
    """Triton takes a while to import, and may not be there."""
    from moetrain.kernels import triton_fp8, triton_launch

    return triton_fp8 if in_float8 else triton_launch


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_ND: Tensor, weights_M: Tensor, rows: Rows, in_float8: bool, hidden: tuple | None, *seen: Tensor
    ) -> Tensor:
        launch = _launch(in_float8)
        gate_up, down = (w.detach().contiguous() for w in hidden or seen)
        x_ND = x_ND.contiguous()
        tiles = launch.plan(rows.offsets_S, num_rows=rows.index_M.shape[0])
        h_M2F, a_MF = launch.up(x_ND, rows.index_M, gate_up, weights_M, tiles)
        y_MD = launch.rows(a_MF, down, tiles, kn=False)
        ctx.save_for_backward(
            x_ND, weights_M, gate_up, down, h_M2F, rows.index_M, rows.back_NJ, rows.offsets_S, tiles.table
        )
        ctx.block, ctx.ragged, ctx.hidden, ctx.in_float8 = tiles.block, rows.ragged, hidden, in_float8
        return launch.sums(y_MD, rows.back_NJ, ragged=rows.ragged)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        launch = _launch(ctx.in_float8)
        x_ND, weights_M, gate_up, down, h_M2F, index_M, back_NJ, offsets_S, table = ctx.saved_tensors
        tiles, g_ND = launch.Tiles(table, ctx.block), g_ND.contiguous()
        d_h, a_MF, d_weights = launch.down_grad(g_ND, index_M, down, weights_M, tiles, h_M2F)

        def d_down(g: Tensor, a: Tensor) -> Tensor:
            return launch.weights(g, a, index_M, offsets_S, gather_left=True)

        def d_gate_up(d_h: Tensor, x: Tensor) -> Tensor:
            return launch.weights(d_h, x, index_M, offsets_S, gather_left=False).view_as(gate_up)

        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None]
        if ctx.hidden is not None:
            deferred.leave(ctx.hidden[1], d_down, g_ND, a_MF)
            deferred.leave(ctx.hidden[0], d_gate_up, d_h, x_ND.detach())
        else:
            if needs[6]:
                found[1] = d_down(g_ND, a_MF)
            if needs[5]:
                found[0] = d_gate_up(d_h, x_ND)
        del a_MF
        d_x = None
        if needs[0]:
            d_x = launch.sums(launch.rows(d_h, gate_up.flatten(1, 2), tiles, kn=True), back_NJ, ragged=ctx.ragged)
        return d_x, d_weights if needs[1] else None, None, None, None, *(found if ctx.hidden is None else ())
