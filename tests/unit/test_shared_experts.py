"""Shared experts against plain loops, one token at a time: alone, gated, and weighed as in residual MoE."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.cli.compose import compose
from moetrain.config import UserError, load
from moetrain.model.flops import size
from moetrain.model.transformer import SharedExpert, Transformer
from moetrain.moe.layer import MoEConfig

D, FF = 6, 5
KINDS = {"alone": {}, "gated": {"shared_gate": True}, "residual": {"residual": True}}


def truth(kind: str, w: dict[str, Tensor], x_D: Tensor, routed_D: Tensor) -> Tensor:
    hidden = [F.silu(w["ffn.gate.weight"][f] @ x_D) * (w["ffn.up.weight"][f] @ x_D) for f in range(FF)]
    own_D = torch.stack([sum(w["ffn.down.weight"][d, f] * hidden[f] for f in range(FF)) for d in range(D)])  # pyright: ignore
    if kind == "alone":
        return routed_D + own_D
    gate = [row @ x_D for row in w["gate.weight"]]
    if kind == "gated":
        return routed_D + own_D / (1 + (-gate[0]).exp())
    own, others = (z.exp() / sum(y.exp() for y in gate) for z in gate)
    return own * own_D + others * routed_D


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_expert_equals_plain_loops(kind) -> None:
    random = torch.Generator().manual_seed(3)
    module = SharedExpert(D, load({"shared_hidden": FF} | KINDS[kind], MoEConfig)).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, generator=random)
    x, routed = (torch.randn(2, 3, D, dtype=torch.float64, generator=random).requires_grad_() for _ in range(2))
    weights = dict(module.named_parameters())
    got = module.join(routed, *module(x))
    pairs = zip(x.flatten(0, 1), routed.flatten(0, 1), strict=True)
    want = torch.stack([truth(kind, weights, x_D, routed_D) for x_D, routed_D in pairs]).view_as(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    seen = [x, routed, *weights.values()]
    away = torch.randn(got.shape, dtype=torch.float64, generator=random)
    for a, b in zip(torch.autograd.grad(got, seen, away), torch.autograd.grad(want, seen, away), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_its_parameters_are_counted(kind) -> None:
    keys = [f"model.moe.{key}={str(value).lower()}" for key, value in KINDS[kind].items()]
    cfg = compose(["model.dim=32", "model.num_layers=2", "model.moe.shared_hidden=24", *keys]).model
    assert size(cfg).total == sum(p.numel() for p in Transformer(cfg).parameters())


@pytest.mark.parametrize("keys", [{}, {"shared_hidden": 8, "shared_gate": True}], ids=str)
def test_residual_weighs_a_shared_expert_itself(keys) -> None:
    with pytest.raises(UserError, match=r"residual=true with .*: it weighs a shared expert itself, set"):
        load({"residual": True} | keys, MoEConfig)
