"""Every dispatcher on the device equals the CPU: outputs, gradients, counts; ties fall alike."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.config import OPTIONS
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.routers.topk import TopK, top_k
from moetrain.moe.types import Context

B, S, D, F, E = 6, 32, 32, 24, 16
DISPATCHERS = {name: cls() for name, cls in OPTIONS["dispatcher"].items()}
DISPATCHERS["capacity, much dropped"] = OPTIONS["dispatcher"]["capacity"](factor=0.5)


def run(device: torch.device, dispatcher, k: int, masked: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = MoE(
        MoEConfig(num_experts=E, hidden=F, router=TopK(top_k=k, renormalize=k > 1), dispatcher=dispatcher),
        dim=D,
        layer=0,
    ).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.5 * draw(*p.shape))
        layer.bias_E.copy_(0.05 * draw(E))
    layer.to(device).begin_step(1)
    x = (draw(B, S, D) + 2 * draw(D)).to(device).requires_grad_()
    ctx = Context(
        step=0, micro_batch=0, sample_B=torch.arange(B), position_S=torch.arange(S, device=device), routed_tokens=1.0
    )  # fmt: skip
    if masked:
        mask_BS = torch.ones(B, S, dtype=torch.bool)
        mask_BS[1], mask_BS[2, 20:] = False, False
        ctx = replace(ctx, mask_BS=mask_BS.to(device))
    y, _ = layer(x, {}, ctx)
    (y * draw(B, S, D).to(device)).sum().backward()
    grads = {f"grad of {n}": p.grad for n, p in layer.named_parameters()}
    found = {"y": y, "grad of x": x.grad, "load": layer.load_ME, "dropped": layer.dropped_ME, **grads}
    return {n: v.detach().cpu() for n, v in found.items()}  # pyright: ignore


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", DISPATCHERS)
def test_every_dispatcher_equals_the_cpu(device, name, k, masked) -> None:
    got, want = (run(where, DISPATCHERS[name], k, masked) for where in (device, torch.device("cpu")))
    for key, expected in want.items():
        if expected.is_floating_point():
            error = (got[key] - expected).norm() / expected.norm().clamp_min(1e-30)
            assert error < 1e-11, f"{key}: relative error {error:.2e}"
        else:
            assert torch.equal(got[key], expected), key


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_ties_go_to_the_lower_expert_id(device, k) -> None:
    scores_TE = torch.randint(0, 4, (4096, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(top_k(scores_TE.to(device), k).cpu(), top_k(scores_TE, k))
