"""The experts' kernels on the device against plain float64 matmuls: forward and every gradient, ragged counts."""

import pytest
import torch
from torch import Tensor

from moetrain.kernels import fused, grouped, reference, te
from moetrain.moe.rows import inverse
from moetrain.moe.types import Rows

E, D, F = 16, 128, 64
COUNTS = {
    "random": [31, 7, 0, 112, 1, 64, 3, 0, 0, 129, 17, 5, 255, 16, 2, 96],
    "even": [64] * E,
    "all to one": [0] * 5 + [777] + [0] * (E - 6),
    "first and last empty": [0] + [33] * (E - 2) + [0],
    "one row": [0] * (E - 1) + [1],
    "no rows": [0] * E,
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def rows(counts: list[int], x_ND: Tensor, weights_N: Tensor) -> Rows:
    """Every row of x goes to one expert, in an order that is not theirs."""
    generator = torch.Generator().manual_seed(1)
    ids_N = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    ids_N = ids_N[torch.randperm(len(ids_N), generator=generator)].to(x_ND.device)
    index_M = ids_N.argsort(stable=True)
    offsets_S = torch.tensor(counts).cumsum(0).to(x_ND.device, torch.int32)
    return Rows(x_ND, index_M, inverse(index_M)[:, None], offsets_S, weights_N[index_M])


def compute(
    backend, counts: list[int], t: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    leaves = {n: v.to(device, dtype, copy=True).requires_grad_() for n, v in t.items() if n != "g"}
    y_ND = backend(rows(counts, leaves["x"], leaves["weights"]), leaves["gate_up"], leaves["down"])
    y_ND.backward(t["g"].to(device, dtype))
    grads = {f"grad of {n}": leaf.grad.double().cpu() for n, leaf in leaves.items()}  # pyright: ignore
    return {"y": y_ND.detach().double().cpu(), **grads}


def inputs(counts: list[int], dtype: torch.dtype, *, seed: int) -> dict[str, Tensor]:
    generator, N = torch.Generator().manual_seed(seed), sum(counts)
    shapes = {"x": (N, D), "weights": (N,), "gate_up": (E, 2, F, D), "down": (E, D, F), "g": (N, D)}
    return {n: torch.randn(shape, generator=generator).to(dtype) * 0.3 for n, shape in shapes.items()}


def against_float64(backend, device: torch.device, dtype: torch.dtype, case: str) -> None:
    counts = COUNTS[case]
    t = inputs(counts, dtype, seed=0)
    if device.type == "cuda":  # what is not written shows
        poison = [torch.full((n,), torch.nan, device=device) for n in (1 << 18, 1 << 20, 1 << 22)]
        del poison
    got = compute(backend, counts, t, device, dtype)
    want = compute(reference.swiglu, counts, t, torch.device("cpu"), torch.float64)
    for name, expected in want.items():
        assert got[name].isfinite().all(), f"{name}: something was not written"
        if name in ("grad of gate_up", "grad of down"):
            empty = [e for e, n in enumerate(counts) if n == 0]
            assert got[name][empty].abs().sum() == 0, f"{name}: experts without rows have a gradient of exactly zero"
        error = (got[name] - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= TOLERANCE[dtype] or expected.norm() == 0, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", COUNTS)
def test_grouped_mm_equals_float64(device, dtype, case) -> None:
    against_float64(grouped.swiglu, device, dtype, case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", COUNTS)
def test_triton_equals_float64(device, dtype, case) -> None:
    runs(device, dtype)
    against_float64(fused.swiglu, device, dtype, case)


@pytest.mark.parametrize("case", COUNTS)
def test_te_equals_float64(device, case) -> None:
    if why := te.unfit(device=device, dtype=torch.bfloat16):
        pytest.skip(why)
    against_float64(te.swiglu, device, torch.bfloat16, case)


def test_triton_is_as_near_as_grouped_mm(device) -> None:
    """In bf16 at most 1.2 times as far from float64, forward and every gradient."""
    runs(device, torch.bfloat16)
    counts = COUNTS["random"]
    t = inputs(counts, torch.bfloat16, seed=2)
    want = compute(reference.swiglu, counts, t, torch.device("cpu"), torch.float64)
    ours, theirs = (compute(b, counts, t, device, torch.bfloat16) for b in (fused.swiglu, grouped.swiglu))
    for name, expected in want.items():
        assert (ours[name] - expected).norm() <= 1.2 * (theirs[name] - expected).norm(), name


def test_triton_block_sizes_give_the_same_bits(device) -> None:
    """Which of them are taken is timed, and may differ from one start to the next."""
    runs(device, torch.bfloat16)
    from moetrain.kernels import triton_launch as launch

    counts = COUNTS["random"]
    t = inputs(counts, torch.bfloat16, seed=3)
    first = compute(fused.swiglu, counts, t, device, torch.bfloat16)
    for tuned in (launch._up, launch._rows, launch._down_grad, launch._weights):
        every = tuned.configs
        for config in every:
            tuned.configs = [config]
            again = compute(fused.swiglu, counts, t, device, torch.bfloat16)
            assert all(torch.equal(again[name], x) for name, x in first.items()), str(config)
        tuned.configs = every


def runs(device: torch.device, dtype: torch.dtype) -> None:
    if why := fused.unfit(device=device, dtype=dtype, dim=D, hidden=F):
        pytest.skip(why)
