"""The optimizer against torch's AdamW and a written-out clip; who decays; the norm."""

import pytest
import torch

from moetrain.config import replace
from moetrain.optim import OptimConfig, Optimizer, clip_scale, grad_norm

NAMES = tuple(f"blocks.0.{n}" for n in ("attention.q.weight", "ffn_norm.weight", "attention.q.bias", "moe.gate.weight"))


def tensors(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype) for n in NAMES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.0, 0.1, 1e6])
def test_five_updates_equal_adamw_written_out(dtype, clip) -> None:
    cfg = OptimConfig(lr=1e-2, clip=clip, weight_decay=0.3)
    params, truth = tensors(dtype, 0), {n: t.double() for n, t in tensors(dtype, 0).items()}
    optimizer = Optimizer(cfg, params)
    first, second = ({n: torch.zeros(5, 3, dtype=torch.float64) for n in NAMES} for _ in range(2))
    for step in range(1, 6):
        grads = tensors(dtype, step)
        exact = {n: g.double().clone() for n, g in grads.items()}
        norm = grad_norm(list(grads.values()), group=None, like=grads[NAMES[0]])
        assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in exact.values()]).norm().item(), rel=1e-6)
        optimizer.step(grads, lr=1e-2, scale=clip_scale(norm, clip=clip))
        factor = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
        for n, w in truth.items():
            g = exact[n] * factor
            w *= 1 - 1e-2 * (0.3 if n.endswith((".q.weight", "gate.weight")) else 0.0)
            first[n] = cfg.beta1 * first[n] + (1 - cfg.beta1) * g
            second[n] = cfg.beta2 * second[n] + (1 - cfg.beta2) * g * g
            hat = first[n] / (1 - cfg.beta1**step), second[n] / (1 - cfg.beta2**step)
            w -= 1e-2 * hat[0] / (hat[1].sqrt() + cfg.eps)
    for n in NAMES:
        torch.testing.assert_close(params[n].double(), truth[n], rtol=0, atol=1e-12 if dtype is torch.float64 else 2e-6)


def test_gates_are_not_decayed_where_that_is_chosen() -> None:
    cfg = replace(OptimConfig(weight_decay=0.5), decay_gates=False)
    params = tensors(torch.float32, 0)
    before = {n: t.clone() for n, t in params.items()}
    Optimizer(cfg, params).step({n: torch.zeros(5, 3) for n in NAMES}, lr=0.1, scale=None)
    changed = [n for n in NAMES if not torch.equal(params[n], before[n])]
    assert changed == ["blocks.0.attention.q.weight"]
