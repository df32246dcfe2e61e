"""Counter-based random numbers: a value is a hash of what it is for, never of who draws it or when.

Every rank, layout, device and replay gets the same numbers without any generator state (law 3 and law 5 of the
numerics). The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

import hashlib
import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_CHUNK = 1 << 18  # elements hashed at a time: the int64 temporaries stay in cache


def key(*parts: int | str) -> int:
    """A signed 64-bit key from numbers and names."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(index: Tensor, *, key: int) -> Tensor:
    """(...) int64 counters -> (...) float64 in the open interval (0, 1), 53 bits each."""
    return (_shift(mixed(index, key=key), 11).double() + 0.5) * 2.0**-53


def mixed(index: Tensor, *, key: int) -> Tensor:
    """(...) int64 counters -> (...) int64, all 64 bits random."""
    z = index * _signed(_GAMMA)
    z += key
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        z ^= _shift(z, bits)
        z *= _signed(factor)
    z ^= _shift(z, 31)
    return z


def fill_normal_(box: Tensor, *, shape: tuple[int, ...], offsets: tuple[int, ...], key: int, std: float) -> None:
    """Fill ``box``, which lies at ``offsets`` of a logical tensor of ``shape``, with N(0, std^2): any cut agrees."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    row_shape = box.shape[1:]
    row = torch.zeros(row_shape, dtype=torch.int64, device=box.device)
    for d in range(1, len(shape)):
        at = (torch.arange(box.shape[d], device=box.device) + offsets[d]) * strides[d]
        row += at.view([-1 if i == d else 1 for i in range(1, len(shape))])
    rows_at_once = max(1, _CHUNK // max(1, row.numel()))
    for start in range(0, box.shape[0], rows_at_once):
        part = box[start : start + rows_at_once]
        first = (torch.arange(part.shape[0], device=box.device) + offsets[0] + start) * strides[0]
        index = first.view(-1, *[1] * row.dim()) + row
        part.copy_(torch.erfinv(2 * uniform(index, key=key) - 1) * (std * math.sqrt(2)))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
