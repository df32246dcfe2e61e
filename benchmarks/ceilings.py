"""What this device reaches at best, measured in the same run: bf16 matmuls through cuBLAS, and copies.

Random data: on zeros a GPU's matmuls run faster than they ever will on real data.
"""

from dataclasses import dataclass
from functools import partial

import torch
from gpu_timing import Timer, free
from torch import Tensor


@dataclass(frozen=True)
class Ceilings:
    matmul: float  # flop/s of a large square bf16 matmul
    copy: float  # bytes/s of a large copy, those read and those written

    def floor(self, *, flops: float, num_bytes: float) -> float:
        """Seconds that nothing can beat."""
        return max(flops / self.matmul, num_bytes / self.copy)

    def __str__(self) -> str:
        return f"matmul {self.matmul / 1e12:.4g} TFLOP/s, copy {self.copy / 1e12:.3g} TB/s"


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def measure(device: torch.device, *, small: bool) -> Ceilings:
    timer, n = Timer(device), 128 if small else 8192
    a, b, out = (random(n, n, device=device) for _ in range(3))
    matmul = 2 * n**3 / timer.median(partial(torch.mm, a, b, out=out))
    source = random(2**20 if small else 2**31, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timer.median(partial(target.copy_, source))
    del a, b, out, source, target
    free()
    return Ceilings(matmul, copy)


def experts(shape: tuple[int, ...], device: torch.device, *, groups: int) -> tuple[float, float]:
    """(forward, backward) seconds of the experts' matmuls alone, on rows that are there already, through cuBLAS.

    ``groups=1``: one dense expert computes all T * K rows; E: one bmm over E experts with equally many.
    """
    T, D, F, _, K = shape
    timer, M = Timer(device), T * K // groups
    x, h2, h = (random(groups, M, width, device=device) for width in (D, 2 * F, F))
    up, down = random(groups, D, 2 * F, device=device), random(groups, F, D, device=device)
    times = [
        timer.median(partial(torch.bmm, a, b), repeats=5, warmup=2)
        for a, b in (
            (x, up), (h, down),
            (h2, up.mT), (x.mT, h2), (x, down.mT), (h.mT, x),
        )
    ]  # fmt: skip
    del x, h2, h, up, down
    free()
    return sum(times[:2]), sum(times[2:])
