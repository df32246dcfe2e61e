"""Attention's kernels on the device against the blocks in float64: values, gradients, replay, memory."""

import pytest
import torch
from torch import Tensor

from moetrain.model.attend import Visible, attend
from moetrain.world import allow_fixed_order, fixed_order

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def zigzag(cp: int, rank: int, length: int) -> tuple[tuple[int, int], ...]:
    size = length // (2 * cp)
    return ((0, length),) if cp == 1 else tuple((c * size, (c + 1) * size) for c in (rank, 2 * cp - 1 - rank))


def documents(B: int, P: int, mean: int | None) -> Tensor | None:
    """Random lengths, with documents of one token in the first row; the last row is one document."""
    if mean is None:
        return None
    begins_BP = torch.rand(B, P, generator=torch.Generator().manual_seed(1)) < 1 / mean
    begins_BP[0, P // 3 : P // 3 + 4] = True
    begins_BP[-1] = False
    return begins_BP.long().cumsum(1)


def leaves(B: int, H: int, G: int, S: int, P: int, d: int) -> list[Tensor]:
    """q, k, v and the output's gradient, laid out as a model lays them out, of values that bf16 holds."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, H, d), (B, P, G, d), (B, P, G, d), (B, S, H, d))
    return [torch.randn(s, generator=generator).to(torch.bfloat16).transpose(1, 2) for s in shapes]


def compute(t: list[Tensor], visible: Visible, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """y, dq, dk, dv."""
    q, k, v = (x.to(device, dtype, copy=True).requires_grad_() for x in t[:3])
    with fixed_order(device, on=True):
        y = attend(q, k, v, visible)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), t[3].to(device, dtype))]


@pytest.fixture(autouse=True)
def _fixed_order(device) -> None:
    allow_fixed_order(device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("mean", "window"),
    [(None, 0), (1, 0), (30, 0), (200, 0), (None, 1), (None, 60), (None, 128), (None, 300), (30, 20), (200, 128)],
)
@pytest.mark.parametrize(("cp", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
@pytest.mark.parametrize(("H", "G", "d"), [(4, 4, 64), (8, 2, 128), (4, 1, 20)])
def test_equals_the_blocks_in_float64(device, H, G, d, cp, rank, mean, window, dtype) -> None:
    """Keys that no query of the piece sees have a gradient of exactly zero: the kernel has to write it."""
    B, P = 3, 456
    pieces, documents_BP = zigzag(cp, rank, P), documents(B, P, mean)
    t = leaves(B, H, G, sum(b - a for a, b in pieces), P, d)
    if device.type == "cuda":  # what is not written shows
        poison = [torch.full((n,), torch.nan, device=device) for n in (1 << 18, 1 << 20, 1 << 22)]
        del poison
    on_device, on_host = (
        Visible.build(pieces=pieces, length=P, documents_BP=documents_BP, device=at, rows=B, window=window)
        for at in (device, torch.device("cpu"))
    )
    want = compute(t, on_host, torch.device("cpu"), torch.float64)
    for name, got, expected in zip(("y", "dq", "dk", "dv"), compute(t, on_device, device, dtype), want, strict=True):
        got = got.double().cpu()
        assert got.isfinite().all(), f"{name}: something was not written"
        error = (got - expected).norm() / expected.norm().clamp_min(1.0)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"
        if name in ("dk", "dv"):
            assert got[:, :, pieces[-1][1] :].abs().sum() == 0, f"{name}: keys after the last query"


@pytest.mark.parametrize(("mean", "window"), [(None, 0), (100, 0), (None, 200), (100, 50)])
@pytest.mark.parametrize("cp", [1, 2])
def test_a_replay_gives_the_same_bits(device, cp, mean, window) -> None:
    B, P = 2, 1024
    pieces, documents_BP = zigzag(cp, 0, P), documents(B, P, mean)
    visible = Visible.build(pieces=pieces, length=P, documents_BP=documents_BP, device=device, rows=B, window=window)
    t = leaves(B, 8, 2, sum(b - a for a, b in pieces), P, 64)
    first, second = (compute(t, visible, device, torch.bfloat16) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("mean", "window"), [(None, 0), (500, 0), (None, 300)])
def test_memory_is_linear_in_the_length(device, mean, window) -> None:
    if device.type != "cuda":
        pytest.skip("counts a GPU's memory")

    def peak(P: int) -> int:
        pieces = zigzag(2, 0, P)
        visible = Visible.build(
            pieces=pieces, length=P, documents_BP=documents(2, P, mean), device=device, rows=2, window=window
        )
        t = leaves(2, 4, 2, P // 2, P, 64)
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        compute(t, visible, device, torch.bfloat16)
        return torch.cuda.max_memory_allocated(device) - base

    peak(256)  # workspaces
    assert peak(16384) < 4.6 * peak(4096)
