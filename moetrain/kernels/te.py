"""Grouped GEMM through NVIDIA's transformer-engine, in bfloat16: a cuBLAS matmul for each slot, on several streams.

It is called below its modules, which own their weights: ``general_grouped_gemm``, whose arguments are those of releases
2.11 to 2.18. The host gives it every slot's rows, so a layer waits for the device once.
"""

import importlib.metadata
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from moetrain import deferred, world
from moetrain.kernels import grouped
from moetrain.moe.rows import gather, gather_sum
from moetrain.moe.types import Rows

RELEASES = Version("2.11"), Version("2.19")


def unfit(*, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why transformer-engine cannot compute this, or None."""
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return "transformer-engine is not installed (pip install 'moetrain[te]')"
    if not RELEASES[0] <= Version(version) < RELEASES[1]:
        return f"transformer-engine is {version}, and its grouped GEMM is called as it is in {RELEASES[0]} to 2.18"
    if world.on_cpu(device):
        return "transformer-engine computes on NVIDIA GPUs, and this is a CPU"
    if dtype is not torch.bfloat16:
        return f"transformer-engine is called in bfloat16 alone, not in {dtype}"
    try:
        _grouped_gemm()
    except (ImportError, OSError) as e:
        return f"transformer-engine {version} cannot be imported ({' '.join(str(e).split())})"
    return None


@cache
def _grouped_gemm() -> Callable[..., Any]:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm  # pyright: ignore

    return general_grouped_gemm


def swiglu(rows: Rows, gate_up_S2FD: Tensor, down_SDF: Tensor, *, again: bool = False) -> Tensor:
    """See ``kernels/__init__.py``."""
    x_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    ends = grouped.ends_on_host(rows.offsets_S, num_rows=x_MD.shape[0])
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    product = partial(_product, sizes=sizes)
    y_MD = grouped.sorted_swiglu(
        product, x_MD, gate_up_S2FD.flatten(1, 2), down_SDF, rows.weights_M, again=again
    )  # fmt: skip
    return gather_sum(y_MD, rows.index_M, rows.back_NJ, ragged=rows.ragged)


def _product(x_MI: Tensor, w_SOI: Tensor, *, sizes: list[int]) -> Tensor:
    """(M, I) rows by slot, (S, O, I) -> (M, O); rows past the last slot's are not written."""
    shape = w_SOI.shape

    def split(x_MX: Tensor) -> list[Tensor]:
        return list(x_MX.contiguous()[: sum(sizes)].split(sizes))

    def y(x_MI: Tensor, w_SOI: Tensor) -> Tensor:
        y_MO = x_MI.new_empty(len(x_MI), shape[1])
        return _gemm(list(w_SOI), split(x_MI), [y_MO], layout="TN", sizes=sizes)

    def d_x(g_MO: Tensor, w_SOI: Tensor) -> Tensor:
        d_x_MI = g_MO.new_empty(len(g_MO), shape[2])
        return _gemm(list(w_SOI), split(g_MO), [d_x_MI], layout="NN", sizes=sizes)

    def d_w(g_MO: Tensor, x_MI: Tensor) -> Tensor:
        d_w_SOI = g_MO.new_empty(shape)
        _gemm(split(x_MI), split(g_MO), list(d_w_SOI), layout="NT", sizes=sizes)
        return d_w_SOI

    return deferred.product(x_MI, w_SOI, y=y, d_x=d_x, d_w=d_w, own=True)


def _gemm(left: list[Tensor], right: list[Tensor], out: list[Tensor], *, layout: str, sizes: list[int]) -> Tensor:
    """In their words: ``out`` = B A^T (TN), B A (NN), one tensor for all slots; B^T A (NT), one for each."""
    if out[0].numel():
        _grouped_gemm()(
            left, right, out, [None] * len(left), out[0].dtype, layout=layout, m_splits=sizes,
            grad=layout != "TN", single_output=layout != "NT",
        )  # fmt: skip
    return out[0]
