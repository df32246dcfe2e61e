"""Starts the kernels of ``triton_gemm.py``: outputs, grids, block sizes. Nothing here waits for the device.

Block sizes are chosen by trying a few, once for a shape: kept where ``caches.py`` has Triton keep what it compiles.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.interpreter import InterpretedFunction

from moetrain.kernels import triton_gemm as gemm

_INTERPRETED = isinstance(gemm.plan_kernel, InterpretedFunction)


@dataclass(frozen=True)
class Tiles:
    """What ``plan`` makes: tiles of ``block`` rows by slot."""

    table: Tensor
    block: int

    @property
    def most(self) -> int:
        return self.table.shape[0] // 3


def plan(offsets_S: Tensor, *, num_rows: int) -> Tiles:
    """(S,) int32 ends of slots, of at most ``num_rows``."""
    S = offsets_S.shape[0]
    block = 128 if num_rows >= 96 * S else 64
    most = num_rows // block + S  # every slot has at most one tile that is not full
    table, tiles_each = offsets_S.new_empty(1 + 3 * most), 16 if _INTERPRETED else 128
    slots = max(16, _power_of_2(S))
    if _real(table):
        _plan[(_blocks(most, tiles_each),)](offsets_S, table, S, BLOCK_M=block, SLOTS=slots, BLOCK_T=tiles_each)
    return Tiles(table, block)


def up(x_ND: Tensor, index_M: Tensor, w_S2FD: Tensor, weights_M: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """-> H (M, 2F) and A' (M, F)."""
    M, (S, _, F, D) = index_M.shape[0], w_S2FD.shape
    h_M2F, a_MF = x_ND.new_empty(M, 2 * F), x_ND.new_empty(M, F)
    _start(_up, x_ND, index_M, w_S2FD, weights_M, tiles.table, h_M2F, a_MF, S, D, F,
           across=F, most=tiles.most, k=D, dtype=x_ND.dtype, BLOCK_M=tiles.block)  # fmt: skip
    return h_M2F, a_MF


def rows(a_MK: Tensor, w: Tensor, tiles: Tiles, *, kn: bool) -> Tensor:
    """(M, K) x (S, K, N) if ``kn`` else (S, N, K) -> (M, N)."""
    (M, K), S, N = a_MK.shape, w.shape[0], w.shape[2 if kn else 1]
    y_MN = a_MK.new_empty(M, N)
    _start(_rows, a_MK, w, tiles.table, y_MN, M, S, K, N,
           across=N, most=tiles.most, k=K, dtype=a_MK.dtype, KN=kn, BLOCK_M=tiles.block)  # fmt: skip
    return y_MN


def sums(y_MD: Tensor, back_NJ: Tensor, *, ragged: bool) -> Tensor:
    """(M, D) -> (N, D): the sum of ``y[back_NJ[n]]``, in order of J, in float32."""
    (N, J), D = back_NJ.shape, y_MD.shape[1]
    out_ND = y_MD.new_empty(N, D)
    wide = min(1024, _power_of_2(D))
    high = max(1, 2048 // wide) if not _INTERPRETED else 64
    if N and _real(out_ND):
        _sums[(_blocks(N, high), _blocks(D, wide))](
            y_MD, back_NJ, out_ND, N, J, D, RAGGED=ragged, BLOCK_R=high, BLOCK_N=wide
        )
    return out_ND


def down_grad(
    g_ND: Tensor, index_M: Tensor, w_SDF: Tensor, weights_M: Tensor, tiles: Tiles, h_M2F: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dH (M, 2F), A' (M, F) and the gradient of ``weights_M``."""
    M, (S, D, F) = index_M.shape[0], w_SDF.shape
    d_h, a_MF = torch.empty_like(h_M2F), h_M2F.new_empty(M, F)
    wide = 128 if F > 64 else 64  # not tried out: dS is a sum of its parts
    parts = weights_M.new_empty(M, _blocks(F, wide), dtype=torch.float32)
    _start(_down_grad, g_ND, index_M, w_SDF, weights_M, tiles.table, h_M2F, d_h, a_MF, parts, S, D, F,
           across=F, most=tiles.most, k=D, dtype=g_ND.dtype, BLOCK_M=tiles.block, BLOCK_N=wide)  # fmt: skip
    return d_h, a_MF, parts.sum(1).to(weights_M.dtype)


def weights(left: Tensor, right: Tensor, index_M: Tensor, offsets_S: Tensor, *, gather_left: bool) -> Tensor:
    """Over each slot's rows: (M, P), (M, Q), one of them gathered -> (S, P, Q)."""
    S, P, Q = offsets_S.shape[0], left.shape[1], right.shape[1]
    out_SPQ = left.new_empty(S, P, Q)
    _start(_weights, left, right, index_M, offsets_S, out_SPQ, S, P, Q,
           across=Q, most=S * _blocks(P, 64), k=64, dtype=left.dtype, GATHER_LEFT=gather_left)  # fmt: skip
    return out_SPQ


def _start(kernel: Any, *args: Any, across: int, most: int, k: int, dtype: torch.dtype, **constants: Any) -> None:
    k_block = 64 if k % 64 == 0 else 32
    if dtype is torch.float32:  # no tf32: half the tile, as its numbers are twice as wide
        k_block = 32
    constants |= {"BLOCK_K": k_block, "PRECISION": "ieee" if dtype is torch.float32 else "tf32"}
    start(kernel, *args, across=across, most=most, **constants)


def start(kernel: Any, *args: Any, across: int, most: int, **constants: Any) -> None:
    """``most`` blocks of rows times ``across`` columns, shared out among as many programs as run at once."""
    if not _real(args[0]):
        return
    _give_descriptors_room()
    programs = 3 if _INTERPRETED else _processors(args[0].device)

    def grid(meta: dict) -> tuple[int]:
        return (max(1, min(programs, most * _blocks(across, meta["BLOCK_N"]))),)

    kernel[grid](*args, **constants)


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _real(x: Tensor) -> bool:
    """A dry run has fake tensors: what is allocated counts, and nothing is computed."""
    return not isinstance(x, FakeTensor)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _give_descriptors_room() -> None:
    """A tensor descriptor that a kernel makes lies in memory that torch's allocator lends it."""

    def lend(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, device="cuda", dtype=torch.int8)

    triton.set_allocator(lend)


def tuned(kernel: Any, shapes: list[str], *tried: dict[str, int]) -> Any:
    """The kernel with the fastest of the sizes ``tried``, found out once for each combination of ``shapes``."""
    configs = []
    for sizes in tried[: 1 if _INTERPRETED else None]:
        sizes = dict(sizes)
        warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
        configs.append(triton.Config(sizes, num_warps=warps, num_stages=stages))
    if len(configs) == 1:
        return triton.autotune(configs, key=[])(kernel)
    return triton.autotune(configs, key=shapes, cache_results=True, do_bench=_quickly)(kernel)


def _quickly(call: Any, quantiles: Any) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


_plan: Any = gemm.plan_kernel
_sums: Any = gemm.sums_kernel
_up = tuned(
    gemm.up_kernel,
    ["num_slots", "D", "F", "BLOCK_M"],
    {"BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 128, "num_warps": 8, "num_stages": 4},
    {"BLOCK_N": 64, "num_warps": 4, "num_stages": 4},
)
_rows = tuned(
    gemm.rows_kernel,
    ["num_slots", "K", "N", "KN", "BLOCK_M"],
    {"BLOCK_N": 256, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 256, "num_warps": 8, "num_stages": 4},
    {"BLOCK_N": 128, "num_warps": 4, "num_stages": 4},
)
_down_grad = tuned(
    gemm.down_grad_kernel,
    ["num_slots", "D", "F", "BLOCK_M"],
    {"num_warps": 8, "num_stages": 3},
    {"num_warps": 8, "num_stages": 4},
)
_weights = tuned(  # rows are found through an index, a load before a load: of two stages one holds a tile
    gemm.weights_kernel,
    ["num_slots", "P", "Q", "GATHER_LEFT"],
    {"BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 8, "num_stages": 5},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 7},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 5},
)
