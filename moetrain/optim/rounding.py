"""Stochastic rounding to bfloat16: up with the probability that makes the mean right, by bits that no layout changes.

float32 is bfloat16 and 16 bits more. Those say how far a number is on its way from one neighbour to the next, away from
zero; 16 random bits added to them carry into bfloat16's own with just that probability. What bfloat16 can represent
has zeros there and never carries. Infinities, NaNs and what is past the largest bfloat16 get nothing added.

The bits of an element are a hash of (seed, step, parameter's name, its index in the logical tensor): four elements a
hash (``counter.py``). So they have to know where the elements of a storage lie in the whole (``Run``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from moetrain import counter
from moetrain.logical import Logical

_LARGEST = 0x7F7F0000
"""The bits of the largest bfloat16."""


@dataclass(frozen=True)
class Run:
    """``rows`` x ``cols`` elements. In a storage row r begins at ``start + r * pitch``, in the logical tensor at
    ``first + r * stride``."""

    start: int
    pitch: int
    first: int
    stride: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def of(self, storage: Tensor) -> Tensor:
        """(rows, cols) of contiguous storage."""
        return storage.as_strided((self.rows, self.cols), (self.pitch, 1), storage.storage_offset() + self.start)

    def cut(self, most: int) -> Iterator["Run"]:
        """The same in runs of at most ``most`` elements, a multiple of 4."""
        if self.cols > most:
            for r, c in product(range(self.rows), range(0, self.cols, most)):
                start, first = self.start + r * self.pitch + c, self.first + r * self.stride + c
                yield Run(start, 0, first, 0, 1, min(most, self.cols - c))
            return
        high = most // self.cols
        for r in range(0, self.rows, high):
            start, first = self.start + r * self.pitch, self.first + r * self.stride
            yield Run(start, self.pitch, first, self.stride, min(high, self.rows - r), self.cols)

    @property
    def aligned(self) -> bool:
        """Whether every row begins with the first of the four elements of a hash."""
        return self.first % 4 == 0 and (self.rows == 1 or self.stride % 4 == 0)


def runs(logical: Logical, storage: Tensor) -> list[Run]:
    """The boxes of a contiguous ``storage``, of which ``logical`` says where they lie; as few as there may be."""
    found: list[Run] = []
    for chunk in logical.chunks:
        box = chunk.tensor
        if not box.numel():
            continue
        at = int(box.storage_offset() - storage.storage_offset())
        for run in _runs(tuple(box.shape), box.stride(), chunk.offsets, logical.shape, at):
            if found and (joined := _joined(found[-1], run)):
                found[-1] = joined
            else:
                found.append(run)
    return found


def _runs(
    sizes: tuple[int, ...], strides: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...], start: int
) -> Iterator[Run]:
    across = [prod(shape[d + 1 :]) for d in range(len(shape))]
    first = sum(offset * step for offset, step in zip(offsets, across, strict=True))
    dims: list[tuple[int, int, int]] = []  # size, step in storage, step in the logical tensor; from the outermost
    for size, step, wide in zip(sizes, strides, across, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1:] == (step * size, wide * size):
            size *= dims.pop()[0]
        dims.append((size, step, wide))
    if not dims or dims[-1][1:] != (1, 1):
        dims.append((1, 1, 1))
    *outer, (rows, pitch, stride), (cols, _, _) = [(1, 0, 0), *dims]
    for index in product(*(range(size) for size, _, _ in outer)):
        there = sum(i * step for i, (_, step, _) in zip(index, outer, strict=True))
        here = sum(i * wide for i, (_, _, wide) in zip(index, outer, strict=True))
        yield Run(start + there, pitch, first + here, stride, rows, cols)


def _joined(a: Run, b: Run) -> Run | None:
    """One run, where ``b`` goes on where ``a`` ends: experts that follow one another."""
    if a.rows == b.rows == 1 and (b.start - a.start, b.first - a.first) == (a.cols, a.cols):
        return Run(a.start, 0, a.first, 0, 1, a.cols + b.cols)
    alike = (a.pitch, a.stride, a.cols) == (b.pitch, b.stride, b.cols)
    if a.rows > 1 and alike and (b.start - a.start, b.first - a.first) == (a.rows * a.pitch, a.rows * a.stride):
        return Run(a.start, a.pitch, a.first, a.stride, a.rows + b.rows, a.cols)
    return None


def key(seed: int, step: int, name: str) -> int:
    return counter.key(seed, "rounding", step, name)


def bits(run: Run, *, key: int, device: torch.device) -> Tensor:
    """(rows, cols) int16, 16 random bits an element."""
    last = run.first + run.cols
    if run.rows == 1 or (run.aligned and run.cols % 4 == 0):
        quads = torch.arange(run.first // 4, -(-last // 4), device=device)
        if run.rows > 1:
            quads = quads + torch.arange(run.rows, device=device)[:, None] * (run.stride // 4)
        four = counter.mixed(quads, key=key).view(torch.int16).view(run.rows, -1)
        return four[:, run.first % 4 : run.first % 4 + run.cols]
    index = torch.arange(run.first, last, device=device)
    index = index + torch.arange(run.rows, device=device)[:, None] * run.stride
    return (counter.mixed(index >> 2, key=key) >> ((index & 3) * 16)).to(torch.int16)


def round_(x: Tensor, bits: Tensor) -> None:
    """Float32 values, rounded in place to such as bfloat16 represents; ``bits`` as ``x``, from ``bits``."""
    whole = x.view(torch.int32)
    added = bits.to(torch.int32).bitwise_and_(0xFFFF)
    below = whole.bitwise_and(0x7FFFFFFF).sub_(_LARGEST + 1).bitwise_right_shift_(31)  # all ones, or zeros
    whole.add_(added.bitwise_and_(below)).bitwise_and_(-0x10000)


def rounded(x: Tensor, logical: Logical, *, key: int) -> Tensor:
    """``x``, contiguous, which lies where ``logical`` says, as bfloat16."""
    x = x.clone()
    for run in runs(logical, x):
        part = run.of(x)
        whole = part.contiguous()
        round_(whole, bits(run, key=key, device=x.device))
        part.copy_(whole)
    return x.bfloat16()
