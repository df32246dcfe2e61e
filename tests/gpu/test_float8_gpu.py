"""Experts in float8 on the device: it rounds as a CPU does, and both ways of multiplying are as near to float64."""

from functools import partial

import pytest
import torch
from test_kernels import COUNTS, E, compute
from torch import Tensor

from moetrain.kernels import float8, fused, reference

D, F, TILE = 256, 128, 128
EMULATED, TRITON = partial(float8.swiglu, TILE), partial(fused.swiglu, in_float8=True)


def inputs(counts: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    generator, N = torch.Generator().manual_seed(4), sum(counts)
    shapes = {"x": (N, D), "weights": (N,), "gate_up": (E, 2, F, D), "down": (E, D, F), "g": (N, D)}
    return {n: torch.randn(shape, generator=generator).to(dtype) * 0.3 for n, shape in shapes.items()}


def as_near(backend, than, counts: list[int], device: torch.device, dtype: torch.dtype) -> None:
    """At most 1.2 times as far from float64 without float8 as ``than`` is on a CPU, forward and every gradient."""
    t, cpu = inputs(counts, dtype), torch.device("cpu")
    want = compute(reference.swiglu, counts, t, cpu, torch.float64)
    mine, theirs = compute(backend, counts, t, device, dtype), compute(than, counts, t, cpu, dtype)
    for name, expected in want.items():
        assert mine[name].isfinite().all(), name
        assert (mine[name] - expected).norm() <= 1.2 * (theirs[name] - expected).norm(), name
        assert (mine[name] - expected).norm() <= 0.1 * expected.norm(), name


def test_float8_rounds_as_on_a_cpu(device) -> None:
    """Bit for bit: ties, what is below e4m3's normal numbers, outliers, zeros, a number that is none."""
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(5)) * torch.logspace(-8, 8, 300)
    x[0], x[1, 5], x[2, 7] = 0, 1e30, torch.inf
    x[3, :8] = torch.tensor([448.0, 17, 19, 21, 23, 25, 27, 29])
    for dtype in (torch.float32, torch.bfloat16):
        for round in (float8.rounded_rows, float8.rounded_blocks):
            here, there = round(x.to(dtype), TILE), round(x.to(device, dtype), TILE).cpu()
            assert torch.equal(here.nan_to_num(nan=-1), there.nan_to_num(nan=-1))


@pytest.mark.parametrize("case", COUNTS)
def test_float8_emulated_is_as_near_as_on_a_cpu(device, case) -> None:
    as_near(EMULATED, EMULATED, COUNTS[case], device, torch.bfloat16)


@pytest.mark.parametrize("case", COUNTS)
def test_float8_in_triton_is_as_near_as_its_emulation(device, case) -> None:
    dtype = runs(device)
    as_near(TRITON, EMULATED, COUNTS[case], device, dtype)


def test_float8_in_triton_has_the_same_bits_with_every_block_size(device) -> None:
    dtype = runs(device)
    from moetrain.kernels import triton_fp8

    counts = COUNTS["random"]
    t = inputs(counts, dtype)
    first = compute(TRITON, counts, t, device, dtype)
    for tuned in (triton_fp8._up, triton_fp8._rows, triton_fp8._down_grad):
        every = tuned.configs
        for config in every:
            tuned.configs = [config]
            again = compute(TRITON, counts, t, device, dtype)
            assert all(torch.equal(again[name], x) for name, x in first.items()), str(config)
        tuned.configs = every


def runs(device: torch.device) -> torch.dtype:
    dtype = torch.float32 if fused.interpreted() else torch.bfloat16
    sizes = {"device": device, "dim": D, "hidden": F}
    if why := fused.unfit(dtype=dtype, **sizes) or fused.unfit_float8(tile=TILE, **sizes):
        pytest.skip(why)
    return dtype
