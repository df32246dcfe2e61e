"""Every balance term against plain loops: value and gradient, float64; the expert bias against its formula."""

from dataclasses import replace
from functools import partial

import pytest
import reference
import torch

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.config import OPTIONS, UserError, load
from moetrain.job import Config, check
from moetrain.moe.attach import attach
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Balance, Context, Tokens

B, S, E, K = 3, 6, 6, 2
LOSSES = [name for name, cls in OPTIONS["balance"].items() if cls.loss is not Balance.loss]  # pyright: ignore
KEYS = {
    "switch": [{}, {"scope": "sequence"}, {"scope": "global_lagged"}, {"scope": "global_buffered"}],
    "device": [{}, {"num_groups": 3}, {"num_groups": E}],
    "communication": [{}, {"num_groups": 3, "max_groups": 2}, {"num_groups": E, "max_groups": 2}],
}
TRIALS = [(name, keys) for name in LOSSES for keys in KEYS.get(name, [{}])]


LOAD = [7, 0, 3, 3, 9, 2]  # of tokens that came before


def term_of(name: str, keys: dict) -> Balance:
    return load({"kind": name} | keys, Balance)


def truth_of(name: str, keys: dict):
    if keys.get("scope", "").startswith("global"):
        return partial(reference.switch, top_k=K, counts=LOAD)
    name = "sequence" if keys.get("scope") == "sequence" else name
    return partial(getattr(reference, name), top_k=K, **{k: v for k, v in keys.items() if k != "scope"})


def held(**more) -> Tokens:
    return Tokens(B, torch.arange(S), lagged_E=torch.tensor(LOAD), buffered_E=torch.tensor(LOAD), **more)


def routed(logits_BSE):
    ctx = Context(step=0, micro_batch=0, sample_B=torch.arange(B), position_S=torch.arange(S), routed_tokens=1.0)
    return TopK(top_k=K)(logits_BSE.flatten(0, 1), torch.zeros(E, dtype=torch.float64), ctx=ctx, layer=0)


@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_every_loss_equals_plain_loops(name, keys) -> None:
    logits = torch.randn(B, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    got = term_of(name, keys).loss(routed(logits), held())
    assert got is not None
    (grad,) = torch.autograd.grad(got, logits)
    want = truth_of(name, keys)(logits)
    (want_grad,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_padding_counts_nowhere(name, keys) -> None:
    logits = torch.randn(B, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = False
    routing = routed(logits)
    routing = replace(routing, ids_TK=torch.where(mask.flatten()[:, None], routing.ids_TK, -1), ragged=True)
    truth = truth_of(name, keys)
    got = term_of(name, keys).loss(routing, held(mask_T=mask.flatten()))
    one_scope = name in ("switch", "device", "communication") and keys.get("scope") != "sequence"
    parts = [logits[mask]] if one_scope else [x[m] for x, m in zip(logits, mask, strict=True)]
    want = sum(truth(x[None]) for x in parts)
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-12, atol=1e-12)


def test_even_load_costs_the_number_of_tokens() -> None:
    """With perfectly even choices and scores, losses of load equal the token count: coef is per token."""
    logits = torch.full((1, E, E), 0.0, dtype=torch.float64)
    logits[0].fill_diagonal_(1e-9)
    ctx = Context(step=0, micro_batch=0, sample_B=torch.arange(1), position_S=torch.arange(E), routed_tokens=1.0)
    routing = TopK(top_k=1, renormalize=False)(
        logits.flatten(0, 1), torch.zeros(E, dtype=torch.float64), ctx=ctx, layer=0
    )
    assert routing.load_E.tolist() == [1] * E
    for name in ("switch", "sequence", "device", "communication"):
        loss = OPTIONS["balance"][name]().loss(routing, Tokens(1, torch.arange(S)))
        assert loss.item() == pytest.approx(E)


def test_before_the_first_step_a_lagging_loss_presses_nowhere() -> None:
    logits = torch.randn(B, S, E, dtype=torch.float64).requires_grad_()
    term = term_of("switch", {"scope": "global_lagged"})
    loss = term.loss(routed(logits), Tokens(B, torch.arange(S), lagged_E=torch.zeros(E, dtype=torch.int64)))
    assert loss is not None
    assert loss.item() == pytest.approx(B * S)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-15


def test_expert_bias_moves_against_the_load() -> None:
    term = OPTIONS["balance"]["expert_bias"](rate=0.5)
    bias = term.bias(torch.zeros(4), torch.tensor([10, 2, 4, 4]))
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert term.bias(bias, torch.tensor([5, 5, 5, 5])).tolist() == bias.tolist()


def test_expert_bias_in_proportion_and_only_for_some_steps() -> None:
    kind, load_E = OPTIONS["balance"]["expert_bias"], torch.tensor([10, 2, 4, 4])
    cfg = load({"kind": "expert_bias", "rate": 0.5, "update": "proportional", "until_step": 3}, kind)
    zero = torch.zeros(4, dtype=torch.float64)
    assert cfg.bias(zero, load_E, step=2).tolist() == [0.5 * (5 - x) / 5 for x in load_E.tolist()]
    assert cfg.bias(zero, load_E, step=3) is zero
    assert cfg.bias(zero, 0 * load_E, step=0).tolist() == [0.0] * 4
    assert kind(rate=0.5).bias(zero, load_E, step=10**9).tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_entropy_of_certain_tokens_is_finite() -> None:
    logits = torch.tensor([[2000.0, 0, 0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    routing = replace(routed(torch.zeros(1, 1, E).double()), logits_TE=logits)
    loss = OPTIONS["balance"]["entropy"]().loss(routing, Tokens(1, torch.arange(1)))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()  # pyright: ignore


REFUSED = [
    ({"kind": "device", "num_groups": 0}, r"balance\.device\.num_groups=0: has to be at least 1"),
    (
        {"kind": "device", "num_groups": 3},
        r"device\.num_groups=3 does not divide .*num_experts=8: use one of \[1, 2, 4",
    ),
    ({"kind": "communication", "num_groups": 5}, r"communication\.num_groups=5 does not divide"),
    ({"kind": "communication", "max_groups": 3}, r"communication\.max_groups=3 of num_groups=2: use 1 to 2"),
    ({"kind": "expert_bias", "until_step": -1}, r"expert_bias\.until_step=-1: use 0"),
]


@pytest.mark.parametrize(("term", "said"), REFUSED, ids=str)
def test_what_cannot_be_meant_is_refused_in_one_line(term, said) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check(load({"model": {"moe": {"balance": {term["kind"]: term}}}, "layout": {"dp": 1}}, Config), world=1)
    assert "\n" not in str(caught.value)


def test_attach_adds_the_weighted_gradient_and_changes_nothing_else() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = attach(3 * x, (x**2).sum(), weight=0.5)
    assert torch.equal(y, 3 * x)
    y.sum().backward()
    assert x.grad.tolist() == [3 + 0.5 * 2 * 1.0, 3 + 0.5 * 2 * 2.0]  # pyright: ignore
