"""The routing kernels on the device beside torch's path there, and beside float64."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moetrain import config as configs
from moetrain.config import UserError
from moetrain.kernels import routing
from moetrain.moe.routers.group_limited import GroupLimited
from moetrain.moe.routers.topk import Score, TopK
from moetrain.moe.rows import sort
from moetrain.moe.types import Context

T = 8192
ROUTERS: dict[str, tuple[TopK, int]] = {
    "8 of 64": (TopK(top_k=8), 64),
    "2 of 8": (TopK(top_k=2), 8),
    "16 of 256, not renormalized": (TopK(top_k=16, renormalize=False), 256),
    "8 of 4 of 8 groups of 32": (
        GroupLimited(top_k=8, num_groups=8, max_groups=4, score=Score.sigmoid, scale=2.5), 256
    ),
    "6 of 160": (TopK(top_k=6, score=Score.sigmoid), 160),
}  # fmt: skip
"""Name -> the router and E."""


@pytest.fixture(autouse=True)
def _runs(device) -> None:
    try:
        routing.check(device=device, dtype=torch.float32)
    except UserError as e:
        pytest.skip(str(e))


def run(router: TopK, logits_TE: Tensor, bias_E: Tensor, g: Tensor) -> list[Tensor]:
    """ids, weights, the gradient of the logits."""
    leaf = logits_TE.clone().requires_grad_()
    ctx = Context(0, 0, torch.arange(1), torch.arange(len(leaf)), 1.0)
    found = router(leaf, bias_E, ctx=ctx, layer=0)
    (d_logits,) = torch.autograd.grad(found.weights_TK, leaf, g.to(leaf.dtype))
    return [found.ids_TK, found.weights_TK.detach(), d_logits]


def inputs(router: TopK, E: int, device: torch.device, *, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator, rows = torch.Generator().manual_seed(0), T if device.type == "cuda" else 64
    logits, bias = torch.randn(rows, E, generator=generator), 0.01 * torch.randn(E, generator=generator)
    if ties:
        logits, bias = (logits * 2).round() / 2, (bias * 100).round() / 100
    return logits.to(device), bias.to(device), torch.randn(rows, router.top_k, generator=generator).to(device)


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", ROUTERS)
def test_choices_are_those_of_the_torch_path(device, name, ties) -> None:
    router, E = ROUTERS[name]
    logits, bias, g = inputs(router, E, device, ties=ties)
    fused = configs.replace(router, fused=True)
    mine, theirs, once_more = (run(r, logits, bias, g) for r in (fused, router, fused))
    assert torch.equal(mine[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(mine, once_more, strict=True))
    leaf = logits.double().requires_grad_()
    truth = router.weigh(leaf, router.scores(leaf), mine[0]).weights_TK
    (d_logits,) = torch.autograd.grad(truth, leaf, g.double())
    for got, their, want in ((mine[1], theirs[1], truth.detach()), (mine[2], theirs[2], d_logits)):
        error, of_torch = ((x.double() - want).norm() / want.norm() for x in (got, their))
        assert error <= max(1.2 * of_torch, 1e-7), (error, of_torch)


@pytest.mark.parametrize("keys", [1, 64, 257, 2049])
@pytest.mark.parametrize("rows", [1, 255, 65536, 262145])
def test_the_order_is_that_of_a_stable_sort(device, rows, keys) -> None:
    rows = rows if device.type == "cuda" else min(rows, 513)
    keys_N = torch.randint(keys, (rows,), generator=torch.Generator().manual_seed(rows)).to(device)
    mine, theirs = (sort(keys_N, num_keys=keys, fused=fused) for fused in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_fewer_kernels_are_launched_than_by_torch(device, name) -> None:
    """Choice, weights, their gradient and the order of rows; what they take is in ``benchmarks/dispatch.py``."""
    if device.type != "cuda":
        pytest.skip("counts a GPU's kernels")
    router, E = ROUTERS[name]
    logits, bias, g = inputs(router, E, device, ties=False)

    def launched(fused: bool) -> int:
        used = configs.replace(router, fused=fused)
        for profiled in (False, True):  # compiled the first time
            with profile(activities=[ProfilerActivity.CUDA]) if profiled else nullcontext() as found:
                ids, _, _ = run(used, logits, bias, g)
                sort(ids.flatten(), num_keys=E, fused=fused)
                torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in found.events())  # pyright: ignore

    assert launched(True) < launched(False)
