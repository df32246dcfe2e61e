"""A pseudo-random permutation of 0..n-1 that needs no memory: any element of it is computed on its own.

A balanced Feistel network permutes the smallest power of four that holds n (Luby & Rackoff 1988); values that land at n
or above walk on through the network until they are below it (cycle walking, Black & Rogaway 2002), which keeps it a
permutation of 0..n-1.
"""

import hashlib

import numpy as np

_ROUNDS = 6


def key(*words: object) -> int:
    """A 64-bit key of the words; the same on every machine and in every process."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(index: np.ndarray, *, n: int, key: int) -> np.ndarray:
    """Where the keyed permutation of 0..n-1 sends each ``index`` (int64, each below n)."""
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    keys = _mix(np.uint64(key) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
    out = _network(index.astype(np.uint64), half_bits, keys)
    while (outside := out >= n).any():
        out[outside] = _network(out[outside], half_bits, keys)
    return out.astype(np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _network(x: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & low
    for round_key in keys:
        left, right = right, left ^ (_mix(right ^ round_key) & low)
    return (left << shift) | right


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014); uint64 arithmetic wraps on purpose."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
