"""The layers that ours is compared with compute the same function, result and gradients, as far as they are here; and
the truth that all are held against is what autograd makes of it."""

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_timing
import intervals
import layer_bench
import peers
from gpu_results import KINDS
from routings import Batch, draw, errors, truth

from moetrain.kernels import Kernel

SHAPE = (64, 32, 16, 8, 2)
FOUND, MISSING = peers.load()
VARIANTS = [
    (peer.name, name) for peer in FOUND for name in peer.variants if name not in ("deepgemm", "sonicmoe")
]  # which need a GPU
IN_BF16 = ("torchtitan",)  # whatever it is given


def problem(dtype: torch.dtype, kind: str = "random") -> tuple[Batch, peers.Weights]:
    torch.manual_seed(0)
    _, D, width, E, K = SHAPE
    gate_ED = torch.randn(E, D, dtype=torch.bfloat16) / D**0.5
    batch = draw(kind, SHAPE, torch.device("cpu"), gate_ED=gate_ED)
    batch = Batch(batch.x_TD.to(dtype), batch.grad_TD.to(dtype), batch.ids_TK, batch.weights_TK)
    gate_up, down = torch.randn(E, 2, width, D) / D**0.5, torch.randn(E, D, width) / width**0.5
    return batch, peers.Weights(gate_up.to(dtype), down.to(dtype), K)


def apart(module: peers.Experts, batch: Batch, weights: peers.Weights) -> dict[str, float]:
    run = layer_bench.Run(module, module, gpu_timing.Timer(torch.device("cpu")), routed=True)
    return errors(run(batch)[1], truth(batch, weights.gate_up_E2FD, weights.down_EDF))


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_what_autograd_says(kind) -> None:
    batch, weights = problem(torch.float32, kind)
    x, w = batch.x_TD.double().requires_grad_(), batch.weights_TK.double().requires_grad_()
    gate_up = weights.gate_up_E2FD.double().requires_grad_()
    down = weights.down_EDF.double().requires_grad_()
    both = torch.einsum("td,tkgfd->tkgf", x, gate_up[batch.ids_TK])
    y_TKD = torch.einsum("tkf,tkdf->tkd", F.silu(both[:, :, 0]) * both[:, :, 1], down[batch.ids_TK])
    y = (y_TKD * w[:, :, None]).sum(1)
    grads = torch.autograd.grad(y, [x, w, gate_up, down], batch.grad_TD.double())
    found = dict(zip(("y", "x", "weights", "gate_up", "down"), (y.detach(), *grads), strict=True))
    worst = errors(found, truth(batch, weights.gate_up_E2FD, weights.down_EDF))
    assert max(worst.values()) < 1e-6, worst  # gradients of weights are kept in float32


def test_balanced_is_balanced_and_Zipf_is_not() -> None:
    loads = {kind: problem(torch.float32, kind)[0].max_violation(SHAPE[3]) for kind in KINDS}
    assert loads["balanced"] == 0.0
    assert loads["Zipf"] > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [k for k in Kernel if k is not Kernel.auto])
def test_ours_computes_it(kernel, dtype) -> None:
    batch, weights = problem(dtype)
    try:
        module = layer_bench.Own(weights, kernel=kernel)
    except Exception as refused:
        pytest.skip(str(refused))
    assert max(apart(module, batch, weights).values()) < (1e-5 if dtype is torch.float32 else layer_bench.WORST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("peer", "variant"), VARIANTS)
def test_a_peer_computes_it(peer, variant, dtype) -> None:
    batch, weights = problem(dtype)
    try:
        module = next(p for p in FOUND if p.name == peer).variants[variant](weights)
    except (AssertionError, ImportError) as missing:
        pytest.skip(f"{peer}: {missing}")
    exact = dtype is torch.float32 and peer not in IN_BF16
    found = apart(module, batch, weights)
    assert max(found.values()) < (1e-5 if exact else layer_bench.WORST), found


def test_what_takes_too_long_is_stopped_and_turns_rotate() -> None:
    with pytest.raises(gpu_timing.OutOfTime, match="not done in"), gpu_timing.limited(0.05):
        time.sleep(5)
    order: list[str] = []
    runs = {name: lambda i, name=name: [float(len(order)), order.append(f"{name}{i}")][:1] for name in "abc"}
    assert set(gpu_timing.in_turns(runs, rounds=3)) == {"a", "b", "c"}
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]


def test_a_ratio_of_what_is_twice_as_slow_is_two() -> None:
    assert intervals.ratio([1.0, 1.1, 0.9], [2.0, 2.2, 1.8]) == pytest.approx((2.0, 2.0, 2.0))
