"""Token rounding against plain loops: choices, weights and gradients in float64; the same under every cut."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from drawn import drawn
from test_routers import (
    FIRST,
    LAYER,
    MASK,
    B,
    E,
    S,
    Truth,
    context,
    found,
    logits,
    made,
    real_positions,
    score,
    weighed,
)
from torch import Tensor

from moetrain.config import OPTIONS, UserError, load
from moetrain.job import Config, check
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.moe.rounding import Rounding, Scope, TokenRounding
from moetrain.moe.types import Tokens
from moetrain.parallel.context import Part

INNER = [
    ("topk", {}),
    ("topk", {"top_k": 3, "score": "sigmoid", "scale": 2.5}),
    ("topk", {"top_k": 1, "renormalize": False}),
    ("group_limited", {"num_groups": 3, "max_groups": 2, "top_k": 3}),
    ("noisy_topk", {"gumbel": 0.5}),
    ("random", {}),
    ("top_p", {"p": 0.7}),
    ("sinkhorn", {}),
]
ROUNDINGS = [
    {"multiple": multiple, "rounding": rounding, "scope": scope}
    for multiple in (2, 3, 4)
    for rounding in ("nearest", "up", "down")
    for scope in ("sequence", "micro_batch")
]


def target(number: int, there: int, rounding: TokenRounding) -> int:
    whole, rest = divmod(number, rounding.multiple)
    up = rounding.rounding is Rounding.up and rest > 0
    up = up or (rounding.rounding is Rounding.nearest and 2 * rest >= rounding.multiple)
    wanted = (whole + up) * rounding.multiple
    return wanted if wanted <= there else there // rounding.multiple * rounding.multiple


def weight(router, name: str, logits_E: Tensor, ids: list[int]) -> dict[int, Tensor]:
    if name == "random":
        return {e: logits_E[e].exp() / sum(logits_E[i].exp() for i in ids) for e in ids}
    scores_E = score(logits_E, router)
    return weighed(scores_E, ids, router) if hasattr(router, "renormalize") else {e: scores_E[e] for e in ids}


def truth(leaf_BSE: Tensor, name: str, router, bias: list[float], rounding: TokenRounding, ctx) -> list[dict]:
    """Of each token: expert -> weight."""
    plain = getattr(Truth, name)(leaf_BSE, bias, router, ctx)
    scopes = [[(b, s) for s in real_positions(ctx, b)] for b in range(B)]
    scopes = [list(itertools.chain(*scopes))] if rounding.scope is Scope.micro_batch else scopes
    taken: list[list[int]] = [[] for _ in range(B * S)]
    for scope in scopes:
        for e in range(E):
            chose = [(b, s) for b, s in scope if e in plain[b * S + s]]
            by_score = {(b, s): score(leaf_BSE[b, s], router)[e].item() for b, s in scope}
            order = sorted(scope, key=lambda at: (at not in chose, -by_score[at], at))
            for b, s in order[: target(len(chose), len(scope), rounding)]:
                taken[b * S + s].append(e)
    return [weight(router, name, leaf_BSE[t // S, t % S], ids) for t, ids in enumerate(taken)]


TRIALS = list(itertools.product(ROUNDINGS, INNER, (False, True)))


@pytest.mark.parametrize(("words", "inner", "padded"), drawn(TRIALS, 24, of="roundings"), ids=str)
def test_rounding_equals_plain_loops(tmp_path, words, inner, padded) -> None:
    name, keys = inner
    inner, bias_E = made(name, keys, tmp_path)
    rounding = load(words, TokenRounding)
    router, ctx = rounding.around(inner), context(mask_BS=MASK if padded else None)
    real_T = MASK.flatten().tolist() if padded else [True] * (B * S)
    leaf = logits().requires_grad_()
    routing = router(leaf.flatten(0, 1), bias_E, ctx=ctx, layer=LAYER)
    want = truth(leaf, name, inner, bias_E.tolist(), rounding, ctx)
    coefficient_TE = torch.linspace(-1, 2, B * S * E, dtype=torch.float64).view(-1, E)
    sums = []
    for choices in (found(routing), want):
        sums.append(sum(coefficient_TE[t, e] * w for t, x in enumerate(choices) for e, w in x.items()))
    for t, (a, b) in enumerate(zip(found(routing), want, strict=True)):
        assert a.keys() == b.keys(), f"token {t}"
        assert real_T[t] or not a
        for e in b:
            torch.testing.assert_close(a[e], b[e], rtol=1e-12, atol=1e-14)
    if any(want):  # else everybody was rounded down to nothing
        grads = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in sums]  # pyright: ignore
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(routing.scores_TE, inner.scores(leaf.flatten(0, 1)))
    again = router.weigh(leaf.flatten(0, 1), routing.scores_TE, routing.ids_TK)
    assert torch.equal(again.ids_TK, routing.ids_TK)
    assert torch.equal(again.weights_TK, routing.weights_TK)
    if rounding.scope is Scope.micro_batch:
        assert not (routing.load_E % rounding.multiple).any()


def test_what_is_rounded_already_stays(tmp_path) -> None:
    for words in ROUNDINGS:
        inner, bias_E = made("topk", {}, tmp_path)
        router, x_TE = load(words, TokenRounding).around(inner), logits().flatten(0, 1)
        routing = router(x_TE, bias_E, ctx=context(), layer=LAYER)
        again = router._rounded(routing.scores_TE, routing.ids_TK, context(), None)  # pyright: ignore
        assert torch.equal(torch.where(again, torch.arange(E), -1), routing.ids_TK)


def test_held_out_data_is_routed_plainly(tmp_path) -> None:
    inner, bias_E = made("topk", {}, tmp_path)
    x_TE, ctx = logits().flatten(0, 1), context(training=False)
    want = inner(x_TE, bias_E, ctx=ctx, layer=LAYER)
    got = TokenRounding(multiple=4).around(inner)(x_TE, bias_E, ctx=ctx, layer=LAYER)
    assert torch.equal(got.ids_TK, want.ids_TK)
    assert torch.equal(got.weights_TK, want.weights_TK)
    assert TokenRounding().around(inner) is TokenRounding(multiple=1).around(inner) is inner


def test_twins_are_a_tie_however_they_were_rounded() -> None:
    x_BSE = logits()
    x_BSE[:, 1::2] = x_BSE[:, :-1:2]  # of each pair the earlier one comes first
    noise = torch.rand(B, S, E, generator=torch.Generator().manual_seed(3)).double()
    for words in ROUNDINGS:
        router = load(words, TokenRounding).around(OPTIONS["router"]["topk"](top_k=2))
        chosen = [
            router(x.flatten(0, 1), torch.linspace(0, 0.1, E).double(), ctx=context(), layer=0).ids_TK
            for x in (x_BSE, x_BSE + 1e-14 * noise, x_BSE - 1e-14 * noise)
        ]
        assert torch.equal(chosen[0], chosen[1])
        assert torch.equal(chosen[0], chosen[2])


def cut(rank: int, world: int, words: dict, seq_len: int) -> list[tuple]:
    """(sample, position, ids, weights) of the tokens that a context rank has, in zigzag with padding."""
    layout = Layout(dp=1, cp=2, tp=world // 2) if world > 1 else Layout(dp=1)
    mesh = Mesh.build(layout, rank=rank, world=world, device=torch.device("cpu"))
    router = load(words, TokenRounding).around(OPTIONS["router"]["topk"](top_k=2))
    part = Part.of(seq_len, mesh)
    x_BSE = torch.nn.functional.pad(logits()[:, :seq_len], (0, 0, 0, part.length - seq_len), value=9.0)
    ctx = context(position_S=part.position_S, mask_BS=part.mask(None, batch=B), length=part.length)
    x_TE = x_BSE[:, part.position_S].flatten(0, 1)
    group = mesh.group("dense", "cp", "tp")
    routing = router(x_TE, torch.linspace(-0.1, 0.1, E).double(), ctx=ctx, layer=LAYER, group=group)
    places = [(b, int(s)) for b in range(B) for s in part.position_S]
    rows = zip(places, routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    return [(*place, ids, weights) for place, ids, weights in rows if place[1] < seq_len]


@pytest.mark.parametrize("world", [2, 4])
def test_every_cut_of_a_sequence_chooses_alike(ranks, world) -> None:
    for words in ROUNDINGS:
        for seq_len in (S, S - 1):
            (want,) = [cut(0, 1, words, seq_len)]
            got = sorted(row for rows in ranks(world).run(cut, words, seq_len) for row in rows)
            assert got == sorted(want), f"{words} {seq_len}"


def test_a_sequence_is_rounded_alike_in_every_micro_batch() -> None:
    for words in (x for x in ROUNDINGS if x["scope"] == "sequence"):
        router = load(words, TokenRounding).around(OPTIONS["router"]["topk"](top_k=2))
        x_BSE, bias_E, ctx = logits(), torch.zeros(E).double(), context()
        want = router(x_BSE.flatten(0, 1), bias_E, ctx=ctx, layer=LAYER).ids_TK.view(B, S, E)
        for b in range(B):
            alone = replace(ctx, sample_B=torch.tensor([FIRST + b]))
            assert torch.equal(router(x_BSE[b], bias_E, ctx=alone, layer=LAYER).ids_TK, want[b])


@pytest.mark.parametrize(("factor", "drops"), [(1.0, True), (9.0, False)])
def test_capacity_is_counted_by_the_routers_top_k(tmp_path, factor, drops) -> None:
    inner, bias_E = made("topk", {}, tmp_path)
    routing = TokenRounding(multiple=2).around(inner)(logits().flatten(0, 1), bias_E, ctx=context(), layer=LAYER)
    tokens = Tokens(B, torch.arange(S))
    _, keep_TE = OPTIONS["dispatcher"]["capacity"](factor=factor)._place(routing, tokens, None)
    kept = keep_TE.view(B, S, E).sum(1)
    assert kept.max() <= math.ceil(factor * S * 2 / E)
    assert (int(kept.sum()) < int(routing.load_E.sum())) == drops


REFUSED = [
    ({"multiple": -1}, {}, r"model\.moe\.rounding\.multiple=-1: .* use 0 for no rounding"),
    (
        {"multiple": 70},
        {},
        r"multiple=70 is more than an expert's even share of a sequence, 64 tokens: .* use 0 to 64 or",
    ),
    ({"multiple": 300, "scope": "micro_batch"}, {}, r"of a micro_batch, 256 tokens: .* use 0 to 256$"),
    (
        {"multiple": 8},
        {"kind": "expert_choice", "non_causal": True},
        r"multiple=8 with router=expert_choice: its experts have even numbers .*; set model\.moe\.rounding\.multiple=0",
    ),
]


@pytest.mark.parametrize(("rounding", "router", "said"), REFUSED, ids=str)
def test_what_cannot_be_meant_is_refused_in_one_line(rounding, router, said) -> None:
    moe = {"rounding": rounding} | ({"router": router} if router else {})
    with pytest.raises(UserError, match=said) as caught:
        check(load({"model": {"moe": moe}, "layout": {"dp": 1}}, Config), world=1)
    assert "\n" not in str(caught.value)
