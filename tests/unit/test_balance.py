"""Every balance term against plain loops: value and gradient, float64; the expert bias against its formula."""

from dataclasses import replace

import pytest
import reference
import torch

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.config import OPTIONS
from moetrain.moe.attach import attach
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Balance, Context, Tokens

B, S, E, K = 3, 6, 5, 2
LOSSES = [name for name, cls in OPTIONS["balance"].items() if cls.loss is not Balance.loss]  # pyright: ignore


def routed(logits_BSE):
    ctx = Context(step=0, micro_batch=0, sample_B=torch.arange(B), position_S=torch.arange(S), routed_tokens=1.0)
    return TopK(top_k=K)(logits_BSE.flatten(0, 1), torch.zeros(E, dtype=torch.float64), ctx=ctx, layer=0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_equals_plain_loops(name) -> None:
    logits = torch.randn(B, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    got = OPTIONS["balance"][name]().loss(routed(logits), Tokens(B, torch.arange(S)))
    (grad,) = torch.autograd.grad(got, logits)
    want = getattr(reference, name)(logits, top_k=K)
    (want_grad,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_nowhere(name) -> None:
    logits = torch.randn(B, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = False
    routing = routed(logits)
    routing = replace(routing, ids_TK=torch.where(mask.flatten()[:, None], routing.ids_TK, -1), ragged=True)
    term = OPTIONS["balance"][name]()
    got = term.loss(routing, Tokens(B, torch.arange(S), mask_T=mask.flatten()))
    if name == "switch":  # one scope: the real tokens of all sequences
        want = reference.switch(logits[mask][None], top_k=K)
    else:
        want = sum(getattr(reference, name)(x[m][None], top_k=K) for x, m in zip(logits, mask, strict=True))
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-12, atol=1e-12)


def test_even_load_costs_the_number_of_tokens() -> None:
    """With perfectly even choices and scores, switch and sequence equal the token count: coef is per token."""
    logits = torch.full((1, E, E), 0.0, dtype=torch.float64)
    logits[0].fill_diagonal_(1e-9)
    ctx = Context(step=0, micro_batch=0, sample_B=torch.arange(1), position_S=torch.arange(E), routed_tokens=1.0)
    routing = TopK(top_k=1, renormalize=False)(
        logits.flatten(0, 1), torch.zeros(E, dtype=torch.float64), ctx=ctx, layer=0
    )
    assert routing.load_E.tolist() == [1] * E
    for name in ("switch", "sequence"):
        loss = OPTIONS["balance"][name]().loss(routing, Tokens(1, torch.arange(S)))
        assert loss.item() == pytest.approx(E)


def test_expert_bias_moves_against_the_load() -> None:
    term = OPTIONS["balance"]["expert_bias"](rate=0.5)
    bias = term.bias(torch.zeros(4), torch.tensor([10, 2, 4, 4]))
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert term.bias(bias, torch.tensor([5, 5, 5, 5])).tolist() == bias.tolist()


def test_attach_adds_the_weighted_gradient_and_changes_nothing_else() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = attach(3 * x, (x**2).sum(), weight=0.5)
    assert torch.equal(y, 3 * x)
    y.sum().backward()
    assert x.grad.tolist() == [3 + 0.5 * 2 * 1.0, 3 + 0.5 * 2 * 2.0]  # pyright: ignore
