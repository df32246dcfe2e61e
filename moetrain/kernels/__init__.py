"""Grouped SwiGLU backends behind one signature; ``choose`` says which one runs and why. Read this file first.

Every backend is a function (rows, gate_up_S2FD, down_SDF, again=False) -> y_ND:

    rows           which rows each slot computes of which rows of x (``moe/types.py``): the gather before and the sum
                   after are the backend's own, so that it may fuse them
    gate_up_S2FD   (S, 2, F, D) gate and up projections of each slot's expert, "out, in"
    down_SDF       (S, D, F)
    again          whether backward computes silu(gate(x)) * up(x) again from gate(x) and up(x), rather than keep it
    y_ND           for each row of x the sum of its rows' weights_M * down(silu(gate(x)) * up(x)), zero if it has none
"""

from collections.abc import Callable
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from moetrain.config import UserError
from moetrain.kernels import float8, fused, grouped, reference, te
from moetrain.kernels import routing as routing

Backend = Callable[..., Tensor]


class Kernel(Enum):
    auto = "auto"
    reference = "reference"
    torch = "torch"
    triton = "triton"
    te = "te"


def choose(
    kernel: Kernel, *, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, fp8_tile: int = 0
) -> tuple[Backend, str]:
    """The backend to run and one line on why; raises ``UserError`` where the one asked for cannot run this.

    ``auto`` does not take the Triton kernels: no GPU has measured them yet (docs/kernels.md).
    """
    if fp8_tile:
        return _in_float8(kernel, fp8_tile, device=device, dtype=dtype, dim=dim, hidden=hidden)
    if kernel is Kernel.triton:
        if why := fused.unfit(device=device, dtype=dtype, dim=dim, hidden=hidden):
            raise UserError(f"model.moe.kernel=triton: {why}; use model.moe.kernel=auto")
        return fused.swiglu, "triton: asked for" + ", interpreted" * fused.interpreted()
    if kernel is Kernel.te:
        if why := te.unfit(device=device, dtype=dtype):
            raise UserError(f"model.moe.kernel=te: {why}; use model.moe.kernel=auto")
        return te.swiglu, "te: asked for"
    unfit = grouped.unfit(dtype=dtype, dim=dim, hidden=hidden)
    if kernel is Kernel.torch and unfit:
        raise UserError(f"model.moe.kernel=torch: {unfit}; use model.moe.kernel=auto or reference")
    if kernel is Kernel.reference:
        return reference.swiglu, "reference: asked for"
    if unfit:
        return reference.swiglu, f"reference: {unfit}"
    return grouped.swiglu, "torch: F.grouped_mm"


def compiled(backend: Backend) -> Backend:
    """The same with what is between its matmuls compiled, where that is apart from them."""
    return partial(backend, compiled=True) if backend is grouped.swiglu else backend


def check(kernel: Kernel, *, fp8_tile: int) -> None:
    """Raise ``UserError`` for a backend that has no float8, wherever it runs."""
    if fp8_tile and kernel in (Kernel.reference, Kernel.te):
        raise UserError(f"model.moe.kernel={kernel.value} has no float8: use model.moe.kernel=auto or fp8_tile=0")


def _in_float8(
    kernel: Kernel, tile: int, *, device: torch.device, dtype: torch.dtype, dim: int, hidden: int
) -> tuple[Backend, str]:
    if why := float8.unfit(dtype=dtype):
        raise UserError(f"model.moe.fp8_tile={tile}: {why}; use bfloat16, or fp8_tile=0")
    if kernel is Kernel.triton:
        sizes = {"device": device, "dim": dim, "hidden": hidden}
        if why := fused.unfit(dtype=dtype, **sizes) or fused.unfit_float8(tile=tile, **sizes):
            raise UserError(f"model.moe.kernel=triton with fp8_tile={tile}: {why}; use model.moe.kernel=auto")
        return partial(fused.swiglu, in_float8=True), f"triton: asked for, float8 e4m3 in tiles of {tile}"
    check(kernel, fp8_tile=tile)
    return partial(float8.swiglu, tile), f"torch: float8 e4m3 in tiles of {tile}, emulated in {dtype}"
