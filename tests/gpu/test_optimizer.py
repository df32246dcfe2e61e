"""AdamW with weights and averages in bfloat16 on the device: torch's operations, beside them the Triton kernel."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moetrain.kernels import fused
from moetrain.optim import OptimConfig, Optimizer, StateDType, UpdateKernel, rounding

SHAPES = {
    "blocks.0.attention.q.weight": (65, 96), "blocks.0.ffn_norm.weight": (131,), "experts": (3, 2, 24, 32),
}  # fmt: skip
KEPT = list(product((torch.float32, torch.bfloat16), StateDType))[1:]


def tensors(seed: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator).to(device) for n, shape in SHAPES.items()}


def after(kernel: UpdateKernel, device: torch.device, weight: torch.dtype, state: StateDType, skip: bool = False):
    """Weights and averages after five steps, the third of which is left out by a flag that the device has."""
    weights = {n: (t * 0.02).to(weight) for n, t in tensors(0, device).items()}
    optimizer = Optimizer(OptimConfig(state_dtype=state, kernel=kernel), weights, seed=5)
    for step in range(5):
        scale = torch.tensor(0.7, dtype=torch.float64, device=device)
        flag = torch.tensor(step == 2, device=device) if skip else None
        optimizer.adamw.step(tensors(step + 1, device), lr=1e-3, scale=scale, skip=flag, step=step)
    states = {f"{kind} of {n}": x for kind, of in optimizer.state().items() for n, x in of.items()}
    return {n: x.cpu() for n, x in (weights | states).items()}


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Float32 to its rounding; in bfloat16 an element that this moves over an edge is its neighbour."""
    for name, x in want.items():
        narrow = x.dtype is torch.bfloat16
        torch.testing.assert_close(got[name].float(), x.float(), rtol=2**-7 if narrow else 1e-5, atol=1e-6)
        assert not narrow or (got[name] != x).double().mean() < 0.01, name


def runs(device: torch.device) -> None:
    if why := fused.unfit_at(device):
        pytest.skip(why)


@pytest.mark.parametrize(("weight", "state"), KEPT, ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_torch_operations_are_the_cpus(device, weight, state, skip) -> None:
    close(
        after(UpdateKernel.torch, device, weight, state, skip),
        after(UpdateKernel.torch, torch.device("cpu"), weight, state, skip),
    )


@pytest.mark.parametrize(("weight", "state"), KEPT, ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_the_triton_kernel_is_torchs_operations(device, weight, state, skip) -> None:
    runs(device)
    got = after(UpdateKernel.triton, device, weight, state, skip)
    close(got, after(UpdateKernel.torch, device, weight, state, skip))
    again = after(UpdateKernel.triton, device, weight, state, skip)
    assert all(torch.equal(again[n], x) for n, x in got.items()), "a step replayed is the same bits"


def test_random_bits_are_the_cpus(device) -> None:
    for run in (rounding.Run(0, 0, 5, 0, 1, 1001), rounding.Run(0, 64, 8, 128, 9, 64), rounding.Run(0, 7, 3, 11, 9, 7)):
        want = rounding.bits(run, key=-(2**62) - 12345, device=torch.device("cpu"))
        assert torch.equal(rounding.bits(run, key=-(2**62) - 12345, device=device).cpu(), want)
