"""AdamW's update of one run of elements in one Triton kernel: weight, gradient and both averages are read once, weight
and averages written once; clip factor, skip flag, decay, bias correction and stochastic rounding are inside.

The arithmetic is that of ``optim/pieces.py``, the random bits are those of ``optim/rounding.py``, bit for bit: four
elements of the logical tensor a hash, which is computed once for the four that a thread has. Numbers in bfloat16 are
loaded and stored as the integers that hold them: Triton's interpreter rounds to bfloat16 otherwise than GPUs do.
"""

# pyright: reportInvalidTypeForm=false
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_QUADS = 256
"""Hashes of a program: 1,024 elements."""


class Rows(Protocol):
    """Where the elements of a run lie: ``optim/rounding.py``."""

    @property
    def start(self) -> int: ...
    @property
    def pitch(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def aligned(self) -> bool: ...


def constants(
    like: Tensor, *, size: float | Tensor, eps: float | Tensor, scale: Tensor | None, skip: Tensor | None
) -> Tensor:
    """(4,) float32 on the device of ``like``, without waiting for it."""
    values = (size, eps, 1.0 if scale is None else scale, 0.0 if skip is None else skip)
    return torch.stack(
        [x.float() if isinstance(x, Tensor) else like.new_full((), x, dtype=torch.float32) for x in values]
    )


def update(
    weights: Tensor, grads: Tensor, first: Tensor, second: Tensor, known: Tensor, *, run: Rows, key: int | None,
    decay: float, beta1: float, beta2: float,
) -> None:  # fmt: skip
    """In place, of contiguous storages. ``known``: ``constants``. ``key``: weights are rounded stochastically by it."""
    if isinstance(weights, FakeTensor):  # a dry run: nothing is allocated here
        return
    quads = min(_QUADS, triton.next_power_of_2(-(-run.cols // 4) + (not run.aligned)))
    blocks = -(-(run.cols + 3 * (not run.aligned)) // (4 * quads))
    weights, first, second = (x.view(torch.int16) if x.dtype is torch.bfloat16 else x for x in (weights, first, second))
    _kernel[(run.rows * blocks,)](
        weights, grads, first, second, known, run.start, run.pitch, run.first, run.stride, run.cols, blocks,
        key or 0, decay, beta1, beta2, ROUND=key is not None, ALIGNED=run.aligned, QUADS=quads,
    )  # fmt: skip


@triton.jit(do_not_specialize=["index", "stride", "blocks", "key"])
def adamw_kernel(
    weights, grads, first, second, known,
    start: tl.int64, pitch: tl.int64, index: tl.int64, stride: tl.int64, cols: tl.int64, blocks: tl.int32,
    key: tl.int64, decay: tl.float32, beta1: tl.float32, beta2: tl.float32,
    ROUND: tl.constexpr, ALIGNED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    index += row * stride
    shift = index * 0 if ALIGNED else index & 3
    quad = block * QUADS + tl.arange(0, QUADS)
    lane = tl.arange(0, 4)
    col = quad[:, None] * 4 + lane[None, :] - shift
    here = (col >= 0) & (col < tl.where(tl.load(known + 3) == 0, cols, 0))
    at = start + row * pitch + col
    size, eps, scale = tl.load(known), tl.load(known + 1), tl.load(known + 2)
    g = tl.load(grads + at, here, 0.0) * scale
    w, m, v = (
        _float(tl.load(weights + at, here, 0)),
        _float(tl.load(first + at, here, 0)),
        _float(tl.load(second + at, here, 0)),
    )
    m += (1 - beta1) * (g - m)
    v = v * beta2 + (1 - beta2) * g * g
    w = w * decay - tl.div_rn(size * m, tl.sqrt_rn(v) + eps)
    _store(first + at, m, _half(m), here)
    _store(second + at, v, _half(v), here)
    if ROUND:
        z = ((index - shift) // 4 + quad).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)
        random = ((z[:, None] >> (16 * lane)[None, :].to(tl.uint64)) & 0xFFFF).to(tl.int32)
        _store(weights + at, w, _added(w, random, 0x7F7F0000), here)
    else:
        tl.store(weights + at, w, here)


@triton.jit
def _float(x):
    """Of the integers that hold bfloat16; what is float32 stays as it is."""
    return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True) if x.dtype == tl.int16 else x


@triton.jit
def _half(x):
    """The nearest bfloat16, ties to even, as an integer."""
    return _added(x, 0x7FFF + ((x.to(tl.int32, bitcast=True) >> 16) & 1), 0x7F7FFFFF)


@triton.jit
def _added(x, low, largest):
    """``low`` is added to the bits of numbers up to ``largest``; the upper half of what comes out."""
    whole = x.to(tl.int32, bitcast=True)
    return ((whole + tl.where((whole & 0x7FFFFFFF) <= largest, low, 0)) >> 16).to(tl.int16)


@triton.jit
def _store(at, x, half, here):
    if at.dtype.element_ty == tl.int16:
        tl.store(at, half, here)
    else:
        tl.store(at, x, here)


_kernel: Any = adamw_kernel
