"""The grouped GEMMs of ``triton_gemm.py`` on float8 e4m3 with scales, and how they are started: ``float8.py`` says what
they compute. Weight gradients, which are not rounded, are those of ``triton_launch.py``.

A tensor core adds up float8 products in fewer bits than float32 has (DeepSeek-V3, arXiv 2412.19437, section 3.3.2):
each tile along what is summed over is multiplied by itself, times its two scales, and added in float32. Both factors
lie "out, in" along that sum, as Hopper wants 8-bit ones: for the gradients of rows the weights are turned around, whose
blocks are as long both ways, so that the numbers stay. BLOCK_K is the tile, of which BLOCK_N is all or a half.
"""

# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels import float8
from moetrain.kernels import triton_launch as launch
from moetrain.kernels.triton_gemm import _into_swiglu, _through_swiglu, _tile
from moetrain.kernels.triton_launch import Tiles, plan, sums, weights

__all__ = ["Tiles", "down_grad", "plan", "rows", "sums", "up", "weights"]
TILE = 128


@triton.jit
def up_kernel(
    x, x_scale, index, w, w_scale, weights, tiles, h, a, num_slots, D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    w_desc = tl.make_tensor_descriptor(w, [num_slots * 2 * F, D], [D, 1], [BLOCK_N, BLOCK_K])
    across = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tiles) * across, tl.num_programs(0)):
        slot, start, end = _tile(tiles, tile // across)
        f = tile % across * BLOCK_N
        row_M = start + tl.arange(0, BLOCK_M)
        inside_M = row_M < end
        source_M = tl.load(index + row_M, mask=inside_M, other=0).to(tl.int64)
        x_MK = x + source_M[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        scale_of_x = x_scale + source_M * (D // BLOCK_K)
        scale_of_gate = w_scale + ((slot * 2 * F + f) // BLOCK_K).to(tl.int64) * (D // BLOCK_K)
        scale_of_up = w_scale + ((slot * 2 * F + F + f) // BLOCK_K).to(tl.int64) * (D // BLOCK_K)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            left = tl.load(x_MK + k)
            scale_M = tl.load(scale_of_x + k // BLOCK_K)
            part = tl.dot(left, w_desc.load([slot * 2 * F + f, k]).T)
            gate += part * (scale_M * tl.load(scale_of_gate + k // BLOCK_K))[:, None]
            part = tl.dot(left, w_desc.load([slot * 2 * F + F + f, k]).T)
            up += part * (scale_M * tl.load(scale_of_up + k // BLOCK_K))[:, None]
        weight_M = tl.load(weights + row_M, mask=inside_M, other=0.0).to(tl.float32)
        _into_swiglu(gate, up, weight_M, h, a, start, inside_M, f, F, BLOCK_M, BLOCK_N)


@triton.jit
def rows_kernel(
    a, a_scale, w, w_scale, tiles, y, num_rows, num_slots, K, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A slot's weight is (N, K)."""
    a_desc = tl.make_tensor_descriptor(a, [num_rows, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w, [num_slots * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tiles) * across, tl.num_programs(0)):
        slot, start, end = _tile(tiles, tile // across)
        n = tile % across * BLOCK_N
        row_M = start + tl.arange(0, BLOCK_M)
        inside_M = row_M < end
        scale_of_a = a_scale + row_M.to(tl.int64) * (K // BLOCK_K)
        scale_of_w = w_scale + ((slot * N + n) // BLOCK_K).to(tl.int64) * (K // BLOCK_K)
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            part = tl.dot(a_desc.load([start, k]), w_desc.load([slot * N + n, k]).T)
            scale_M = tl.load(scale_of_a + k // BLOCK_K, mask=inside_M, other=0.0)
            sum_MN += part * (scale_M * tl.load(scale_of_w + k // BLOCK_K))[:, None]
        n_N = n + tl.arange(0, BLOCK_N)
        y_MN = y + start.to(tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + n_N[None, :])
        tl.store(y_MN, sum_MN.to(y.dtype.element_ty), mask=inside_M[:, None] & (n_N < N)[None, :])


@triton.jit
def down_grad_kernel(
    g, g_scale, index, w, w_scale, weights, tiles, h, d_h, a, d_scale, num_slots, D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``g``: dO, by row of x; a slot's weight is (F, D); ``d_scale`` (M, columns of tiles): parts of dS."""
    w_desc = tl.make_tensor_descriptor(w, [num_slots * F, D], [D, 1], [BLOCK_N, BLOCK_K])
    across = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tiles) * across, tl.num_programs(0)):
        slot, start, end = _tile(tiles, tile // across)
        f = tile % across * BLOCK_N
        row_M = start + tl.arange(0, BLOCK_M)
        inside_M = row_M < end
        source_M = tl.load(index + row_M, mask=inside_M, other=0).to(tl.int64)
        g_MK = g + source_M[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        scale_of_g = g_scale + source_M * (D // BLOCK_K)
        scale_of_w = w_scale + ((slot * F + f) // BLOCK_K).to(tl.int64) * (D // BLOCK_K)
        d_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            part = tl.dot(tl.load(g_MK + k), w_desc.load([slot * F + f, k]).T)
            d_a += part * (tl.load(scale_of_g + k // BLOCK_K) * tl.load(scale_of_w + k // BLOCK_K))[:, None]
        scale_M = tl.load(weights + row_M, mask=inside_M, other=0.0).to(tl.float32)
        left_half, right_half = d_a.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        part_M = _through_swiglu(left_half, scale_M, h, d_h, a, start, inside_M, f, F, BLOCK_M, BLOCK_N // 2)
        f += BLOCK_N // 2
        part_M += _through_swiglu(right_half, scale_M, h, d_h, a, start, inside_M, f, F, BLOCK_M, BLOCK_N // 2)
        tl.store(d_scale + row_M.to(tl.int64) * across + tile % across, part_M, mask=inside_M)


def up(x_ND: Tensor, index_M: Tensor, w_S2FD: Tensor, weights_M: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """-> H (M, 2F) and A' (M, F)."""
    M, (S, _, F, D) = index_M.shape[0], w_S2FD.shape
    h_M2F, a_MF = x_ND.new_empty(M, 2 * F), x_ND.new_empty(M, F)
    x, w = _whole(float8.quantize_rows(x_ND, TILE)), _whole(float8.quantize_blocks(w_S2FD, TILE))
    _start(_up, *x, index_M, *w, weights_M, tiles.table, h_M2F, a_MF, S, D, F, across=F, tiles=tiles)
    return h_M2F, a_MF


def rows(a_MK: Tensor, w: Tensor, tiles: Tiles, *, kn: bool) -> Tensor:
    """(M, K) x (S, K, N) if ``kn`` else (S, N, K) -> (M, N)."""
    (M, K), S, N = a_MK.shape, w.shape[0], w.shape[2 if kn else 1]
    y_MN, values = a_MK.new_empty(M, N), float8.quantize_blocks(w, TILE)
    a, w8 = _whole(float8.quantize_rows(a_MK, TILE)), _whole(x.transpose(1, 2) if kn else x for x in values)
    _start(_rows, *a, *w8, tiles.table, y_MN, M, S, K, N, across=N, tiles=tiles)
    return y_MN


def down_grad(
    g_ND: Tensor, index_M: Tensor, w_SDF: Tensor, weights_M: Tensor, tiles: Tiles, h_M2F: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dH (M, 2F), A' (M, F) and the gradient of ``weights_M``."""
    M, (S, D, F) = index_M.shape[0], w_SDF.shape
    d_h, a_MF = torch.empty_like(h_M2F), h_M2F.new_empty(M, F)
    wide = TILE // 2  # not tried out: dS is a sum of its parts
    parts = weights_M.new_empty(M, F // wide, dtype=torch.float32)
    g = _whole(float8.quantize_rows(g_ND, TILE))
    w = _whole(x.transpose(1, 2) for x in float8.quantize_blocks(w_SDF, TILE))
    _start(_down_grad, *g, index_M, *w, weights_M, tiles.table, h_M2F, d_h, a_MF, parts, S, D, F,
           across=F, tiles=tiles, BLOCK_N=wide)  # fmt: skip
    return d_h, a_MF, parts.sum(1).to(weights_M.dtype)


def _whole(found: Iterable[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in found]


def _start(kernel: Any, *args: Any, across: int, tiles: Tiles, **sizes: int) -> None:
    launch.start(kernel, *args, across=across, most=tiles.most, BLOCK_M=tiles.block, BLOCK_K=TILE, **sizes)


_up = launch.tuned(
    up_kernel,
    ["num_slots", "D", "F", "BLOCK_M"],
    {"BLOCK_N": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_N": 64, "num_warps": 8, "num_stages": 5},
)
_rows = launch.tuned(
    rows_kernel,
    ["num_slots", "K", "N", "BLOCK_M"],
    {"BLOCK_N": 128, "num_warps": 8, "num_stages": 4},
    {"BLOCK_N": 128, "num_warps": 8, "num_stages": 5},
    {"BLOCK_N": 64, "num_warps": 4, "num_stages": 4},
)
_down_grad = launch.tuned(
    down_grad_kernel,
    ["num_slots", "D", "F", "BLOCK_M"],
    {"num_warps": 8, "num_stages": 3},
    {"num_warps": 8, "num_stages": 5},
)
