"""Every router against plain loops: choices, weights and gradients in float64; the same under every cut of a batch."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import counter
from moetrain.config import OPTIONS, UserError, load
from moetrain.job import Config, check
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.moe.routers.replay import save_choices
from moetrain.moe.routers.topk import Score
from moetrain.moe.types import Context
from moetrain.parallel.context import Part

B, S, E, SEED, LAYER = 3, 7, 6, 11, 2
FIRST = 5  # global id of the first sample
Choices = list[dict[int, Tensor]]  # of each token: expert -> weight

CASES = {
    "topk": [{}, {"top_k": 3, "score": "sigmoid", "scale": 2.5}, {"top_k": 1, "renormalize": False}],
    "replay": [{}, {"renormalize": False}],
    "group_limited": [
        {"num_groups": 3},
        {"num_groups": 3, "max_groups": 2, "top_k": 4, "score": "sigmoid"},
        {"num_groups": 2, "max_groups": 1, "top_k": 3, "group_score": "max"},
        {"num_groups": 6, "max_groups": 3, "top_k": 3, "renormalize": False},
    ],
    "noisy_topk": [{}, {"gumbel": 0.0, "jitter": 0.3, "top_k": 3}, {"gumbel": 0.5, "jitter": 0.5, "score": "sigmoid"}],
    "random": [{}, {"top_k": 4, "until_step": 9}, {"balanced": True}, {"balanced": True, "top_k": 4, "until_step": 9}],
    "top_p": [{}, {"p": 0.9, "top_k": 6}, {"p": 0.05, "top_k": 2}, {"p": 0.7, "top_k": 2}],
    "expert_choice": [{}, {"factor": 1.7, "top_k": 1}, {"factor": 99.0}],
    "sinkhorn": [{}, {"top_k": 1}, {"iterations": 3, "tolerance": 0.0}, {"top_k": 3, "tolerance": 0.05}],
}
TRIALS = [(name, keys) for name in OPTIONS["router"] for keys in CASES[name]]


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def score(logits_E: Tensor, router) -> Tensor:
    sigmoid = getattr(router, "score", None) is Score.sigmoid
    return logits_E.sigmoid() if sigmoid else logits_E.exp() / logits_E.exp().sum()


def plus(scores_E: Tensor, bias: list[float]) -> list[float]:
    return [s + b for s, b in zip(scores_E.tolist(), bias, strict=True)]


def weighed(scores_E: Tensor, ids: list[int], router) -> dict[int, Tensor]:
    total = sum(scores_E[e] for e in ids) if router.renormalize else 1.0
    return {e: router.scale * scores_E[e] / total for e in ids}


def uniform(sample: int, position: int, expert: int, *key: int | str) -> float:
    """SplitMix64 in plain integers."""
    ones = (1 << 64) - 1
    z = ((sample * 2**22 + position) * E + expert) * 0x9E3779B97F4A7C15 + counter.key(SEED, *key) & ones
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & ones
    z = (z ^ z >> 27) * 0x94D049BB133111EB & ones
    return (((z ^ z >> 31) >> 11) + 0.5) * 2.0**-53


def tokens(logits_BSE: Tensor):
    """(sample, position, logits) of each token, in order."""
    for b, logits_SE in enumerate(logits_BSE):
        for s, logits_E in enumerate(logits_SE):
            yield FIRST + b, s, logits_E


def real_positions(ctx: Context, b: int) -> list[int]:
    return [s for s in range(S) if ctx.mask_BS is None or ctx.mask_BS[b, s]]


class Truth:
    """Each router in plain loops; ``ctx`` has the step and whether it trains."""

    @staticmethod
    def topk(logits_BSE, bias, router, ctx) -> Choices:
        found = []
        for _, _, logits_E in tokens(logits_BSE):
            scores_E = score(logits_E, router)
            found.append(weighed(scores_E, best(plus(scores_E, bias), router.top_k), router))
        return found

    @staticmethod
    def replay(logits_BSE, bias, router, ctx) -> Choices:
        return [
            weighed(score(x, router), [(sample + s) % E, (sample + s + 2) % E], router)
            for sample, s, x in tokens(logits_BSE)
        ]

    @staticmethod
    def group_limited(logits_BSE, bias, router, ctx) -> Choices:
        found, size = [], E // router.num_groups
        speak = 1 if router.group_score.value == "max" else math.ceil(router.top_k / router.max_groups)
        for _, _, logits_E in tokens(logits_BSE):
            scores_E = score(logits_E, router)
            steered, groups = plus(scores_E, bias), []
            for g in range(router.num_groups):
                groups.append(sum(sorted(steered[g * size : (g + 1) * size], reverse=True)[:speak]))
            allowed = best(groups, router.max_groups)
            steered = [x if e // size in allowed else -math.inf for e, x in enumerate(steered)]
            found.append(weighed(scores_E, best(steered, router.top_k), router))
        return found

    @staticmethod
    def noisy_topk(logits_BSE, bias, router, ctx) -> Choices:
        found = []
        for sample, s, logits_E in tokens(logits_BSE):
            noisy = logits_E.detach().clone()
            for e in range(E) if ctx.training else ():
                noisy[e] *= 1 + router.jitter * (2 * uniform(sample, s, e, "jitter", ctx.step, LAYER) - 1)
                noisy[e] -= router.gumbel * math.log(-math.log(uniform(sample, s, e, "gumbel", ctx.step, LAYER)))
            ids = best(plus(score(noisy, router), bias), router.top_k)
            found.append(weighed(score(logits_E, router), ids, router))
        return found

    @staticmethod
    def random(logits_BSE, bias, router, ctx) -> Choices:
        found = []
        k = router.top_k
        if ctx.step < router.until_step:
            k = math.floor(router.k_min + (k - router.k_min) * ctx.step / router.until_step + 0.5)
        for sample, s, logits_E in tokens(logits_BSE):
            if router.balanced:
                ids = [((sample + s) * k + j) % E for j in range(k)]
            else:
                ids = best([uniform(sample, s, e, "random", LAYER) for e in range(E)], k)
            found.append({e: logits_E[e].exp() / sum(logits_E[i].exp() for i in ids) for e in ids})
        return found

    @staticmethod
    def top_p(logits_BSE, bias, router, ctx) -> Choices:
        found = []
        for _, _, logits_E in tokens(logits_BSE):
            scores_E, chosen = score(logits_E, router), {}
            for e in best(plus(scores_E, bias), router.top_k):
                chosen[e] = scores_E[e]
                if sum(x.item() for x in chosen.values()) > router.p:
                    break
            found.append(chosen)
        return found

    @staticmethod
    def expert_choice(logits_BSE, bias, router, ctx) -> Choices:
        found = []
        for b, logits_SE in enumerate(logits_BSE):
            real = real_positions(ctx, b)
            scores = [score(x, router) for x in logits_SE]
            chosen: Choices = [{} for _ in range(S)]
            for e in range(E):
                values = [scores[s][e].item() for s in real]
                for i in best(values, math.ceil(router.factor * len(real) * router.top_k / E)):
                    chosen[real[i]][e] = scores[real[i]][e]
            found += chosen
        return found

    @staticmethod
    def sinkhorn(logits_BSE, bias, router, ctx) -> Choices:
        found = []
        for b, logits_SE in enumerate(logits_BSE):
            real = real_positions(ctx, b)
            cost = logits_SE.detach().exp()
            row, column = torch.ones(S, dtype=cost.dtype), torch.ones(E, dtype=cost.dtype)
            for _ in range(router.iterations if ctx.training else 0):
                for s in real:
                    row[s] = 1 / (len(real) * sum(column[e] * cost[s, e] for e in range(E)))
                before = column.clone()
                for e in range(E):
                    column[e] = 1 / (E * sum(row[s] * cost[s, e] for s in real))
                if (column - before).abs().mean() < router.tolerance:
                    break
            for s in range(S):
                scores_E = logits_SE[s].sigmoid() if router.top_k == 1 else score(logits_SE[s], router)
                ids = best([float(column[e] * cost[s, e]) for e in range(E)], router.top_k)
                found.append({e: scores_E[e] for e in ids})
        return found


def logits() -> Tensor:
    x_BSE = torch.empty(B, S, E, dtype=torch.float64)
    counter.fill_normal_(x_BSE, shape=(B, S, E), offsets=(0, 0, 0), key=counter.key("logits"), std=1.5)
    x_BSE[0, 3] = 0.25  # a tie of all experts
    x_BSE[1, 2] = x_BSE[1, 1]  # a tie of two tokens
    return x_BSE


def made(name: str, keys: dict, folder) -> tuple:
    """The router, and the selection bias it is called with."""
    if name == "replay":
        ids_BSK = torch.tensor([[[(FIRST + b + s) % E, (FIRST + b + s + 2) % E] for s in range(S)] for b in range(B)])
        save_choices(folder / "ids", {4: {LAYER: ids_BSK}}, first_sample={4: FIRST})
        keys = keys | {"path": str(folder / "ids")}
    if name == "expert_choice":
        keys = keys | {"non_causal": True}
    router = load({"kind": name} | keys, OPTIONS["router"][name])
    router.check(num_experts=E)
    return router, torch.linspace(-0.1, 0.1, E, dtype=torch.float64)


def context(**more) -> Context:
    known = {"step": 4, "micro_batch": 0, "routed_tokens": 1.0, "seed": SEED} | more
    return Context(**{"sample_B": torch.arange(B) + FIRST, "position_S": torch.arange(S)} | known)  # pyright: ignore


def found(routing) -> Choices:
    return [
        {int(e): w for e, w in zip(ids, weights, strict=True) if e >= 0}
        for ids, weights in zip(routing.ids_TK.tolist(), routing.weights_TK, strict=True)
    ]


MASK = torch.ones(B, S, dtype=torch.bool)
MASK[1, 4:] = False
MASK[2, 6:] = False


@pytest.mark.parametrize("kind", ["training", "held out", "padded"])
@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_every_router_equals_plain_loops(tmp_path, name, keys, kind) -> None:
    router, bias_E = made(name, keys, tmp_path)
    ctx = context(training=kind != "held out", mask_BS=MASK if kind == "padded" else None)
    real_T = MASK.flatten().tolist() if kind == "padded" else [True] * (B * S)
    leaf = logits().requires_grad_()
    routing = router(leaf.flatten(0, 1), bias_E, ctx=ctx, layer=LAYER)
    assert routing.ragged or (routing.ids_TK >= 0).all()
    want = getattr(Truth, name)(leaf, bias_E.tolist(), router, ctx)
    coefficient_TE = torch.linspace(-1, 2, B * S * E, dtype=torch.float64).view(-1, E)
    sums = []
    for choices in (found(routing), want):
        pairs = [(t, e, w) for t, x in enumerate(choices) for e, w in x.items() if real_T[t]]
        sums.append(sum(coefficient_TE[t, e] * w for t, e, w in pairs))
    for t, (a, b) in enumerate(zip(found(routing), want, strict=True)):
        if real_T[t]:
            assert a.keys() == b.keys(), f"token {t}"
            for e in b:
                torch.testing.assert_close(a[e], b[e], rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in sums]  # pyright: ignore
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(routing.scores_TE, router.scores(leaf.flatten(0, 1)))
    assert routing.load_E.sum() == sum(map(len, found(routing)))


@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_choices_are_weighed_again_as_they_were(tmp_path, name, keys) -> None:
    router, bias_E = made(name, keys, tmp_path)
    logits_TE = logits().flatten(0, 1)
    first = router(logits_TE, bias_E, ctx=context(mask_BS=MASK), layer=LAYER)
    again = router.weigh(logits_TE, router.scores(logits_TE), first.ids_TK)
    assert again.ragged == first.ragged
    for field in ("ids_TK", "weights_TK", "scores_TE"):
        assert torch.equal(getattr(again, field), getattr(first, field)), field


def cut(rank: int, world: int, name: str, keys: dict, path: str, seq_len: int) -> list[tuple]:
    """(sample, position, ids, weights) of the tokens that a context rank has, in zigzag with padding."""
    layout = Layout(dp=1, cp=2, tp=world // 2) if world > 1 else Layout(dp=1)
    mesh = Mesh.build(layout, rank=rank, world=world, device=torch.device("cpu"))
    router = load({"kind": name} | keys | ({"path": path} if path else {}), OPTIONS["router"][name])
    part = Part.of(seq_len, mesh)
    x_BSE = torch.nn.functional.pad(logits()[:, :seq_len], (0, 0, 0, part.length - seq_len), value=9.0)
    ctx = context(position_S=part.position_S, mask_BS=part.mask(None, batch=B), length=part.length)
    bias_E = torch.linspace(-0.1, 0.1, E, dtype=torch.float64)
    x_TE = x_BSE[:, part.position_S].flatten(0, 1)
    routing = router(x_TE, bias_E, ctx=ctx, layer=LAYER, group=mesh.group("dense", "cp", "tp"))
    places = [(b, int(s)) for b in range(B) for s in part.position_S]
    rows = zip(places, routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    return [(*place, ids, weights) for place, ids, weights in rows if place[1] < seq_len]


@pytest.mark.parametrize("world", [2, 4])
def test_every_cut_of_a_sequence_chooses_alike(ranks, tmp_path, world) -> None:
    for name, keys in TRIALS:
        router, _ = made(name, keys, tmp_path)
        keys = keys | ({"non_causal": True} if name == "expert_choice" else {})
        words = name, keys, getattr(router, "path", ""), S - 1
        (want,) = [cut(0, 1, *words)]
        got = sorted(row for rows in ranks(world).run(cut, *words) for row in rows)
        assert got == sorted(want), f"{name} {keys}"


@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_every_cut_of_a_batch_chooses_alike(tmp_path, name, keys) -> None:
    router, bias_E = made(name, keys, tmp_path)
    x_BSE, ctx = logits(), context()
    want = router(x_BSE.flatten(0, 1), bias_E, ctx=ctx, layer=LAYER)
    for b in range(B):
        got = router(x_BSE[b], bias_E, ctx=replace(ctx, sample_B=ctx.sample_B[b : b + 1]), layer=LAYER)
        assert torch.equal(got.ids_TK, want.ids_TK.unflatten(0, (B, S))[b])
        assert torch.equal(got.weights_TK, want.weights_TK.unflatten(0, (B, S))[b])


def test_twins_are_a_tie_for_an_expert_however_they_were_rounded() -> None:
    router = OPTIONS["router"]["expert_choice"](top_k=1)
    x_BSE = logits()
    x_BSE[:, 1::2] = x_BSE[:, :-1:2]  # of each pair the earlier one comes first
    noise = torch.rand(B, S, E, generator=torch.Generator().manual_seed(3)).double()
    chosen = [
        router(x.flatten(0, 1), torch.zeros(E).double(), ctx=context(), layer=0).ids_TK
        for x in (x_BSE, x_BSE + 1e-14 * noise, x_BSE - 1e-14 * noise)
    ]
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])


def test_noise_differs_between_steps_layers_samples_and_positions() -> None:
    router = OPTIONS["router"]["noisy_topk"](top_k=2)
    x_TE, bias_E = torch.zeros(B * S, E), torch.zeros(E)
    chosen = [
        router(x_TE, bias_E, ctx=context(step=step), layer=layer).ids_TK for step, layer in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({str(x.tolist()) for x in chosen}) == 3
    assert len({str(row) for row in chosen[0].tolist()}) > 8
    assert torch.equal(chosen[0], router(x_TE, bias_E, ctx=context(step=0), layer=0).ids_TK)


def test_gumbel_noise_draws_from_the_softmax() -> None:
    logits_E = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], dtype=torch.float64)
    router = OPTIONS["router"]["noisy_topk"](top_k=1, renormalize=False)
    T = 20000
    ctx = context(position_S=torch.arange(T), sample_B=torch.zeros(1).long())
    routing = router(logits_E.expand(T, E), torch.zeros(E).double(), ctx=ctx, layer=0)
    torch.testing.assert_close(routing.load_E.double() / T, logits_E.softmax(0), atol=0.012, rtol=0)


def test_random_choices_stay_and_grow() -> None:
    router = OPTIONS["router"]["random"](top_k=5, k_min=2, until_step=8)
    x_TE, bias_E = logits().flatten(0, 1), torch.zeros(E)
    widths, before = [], None
    for step in range(10):
        ids_TK = router(x_TE, bias_E, ctx=context(step=step), layer=0).ids_TK
        assert before is None or torch.equal(ids_TK[:, : before.shape[1]], before)
        widths, before = [*widths, ids_TK.shape[1]], ids_TK
    assert widths == [2, 2, 3, 3, 4, 4, 4, 5, 5, 5]
    balanced = OPTIONS["router"]["random"](top_k=2, balanced=True)
    ctx = context(position_S=torch.arange(E))
    assert balanced(x_TE[: B * E], bias_E, ctx=ctx, layer=0).load_E.tolist() == [B * 2] * E


def test_sinkhorn_and_expert_choice_even_the_load() -> None:
    x_TE = torch.randn(200, E, generator=torch.Generator().manual_seed(0)).double() + torch.arange(E)
    ctx = context(position_S=torch.arange(200), sample_B=torch.zeros(1).long())
    most = {}
    for name in ("topk", "sinkhorn", "expert_choice"):
        load_E = OPTIONS["router"][name](top_k=2)(x_TE, torch.zeros(E).double(), ctx=ctx, layer=0).load_E
        most[name] = load_E.max().item() / (200 * 2 / E)
    assert most["expert_choice"] == pytest.approx(1, abs=0.01)
    assert most["sinkhorn"] < 1.4 < 2 < most["topk"]
    huge = OPTIONS["router"]["sinkhorn"](top_k=2)(1e3 * x_TE, torch.zeros(E).double(), ctx=ctx, layer=0)
    assert huge.weights_TK.isfinite().all()


REFUSED = [
    ({"kind": "group_limited", "num_groups": 0}, r"num_groups=0: has to be at least 1"),
    ({"kind": "group_limited", "max_groups": 5}, r"max_groups=5 of num_groups=4: use 1 to 4"),
    ({"kind": "group_limited", "num_groups": 3}, r"num_groups=3 does not divide .*num_experts=8: use one of \[1, 2, 4"),
    ({"kind": "group_limited", "top_k": 5}, r"top_k=5 is more than the 4 experts of max_groups=2 groups of 2"),
    ({"kind": "noisy_topk", "gumbel": -1.0}, r"gumbel=-1\.0: noise cannot be negative"),
    ({"kind": "noisy_topk", "jitter": 1.0}, r"jitter=1\.0: has to be in \[0, 1\)"),
    ({"kind": "noisy_topk", "gumbel": 0.0}, r"gumbel=0 with jitter=0 is no noise"),
    ({"kind": "noisy_topk", "top_k": 1}, r"top_k=1 with renormalize=true"),
    ({"kind": "random", "k_min": 3}, r"k_min=3 with top_k=2: .* use 1 to 2"),
    ({"kind": "random", "until_step": -1}, r"until_step=-1: use 0"),
    ({"kind": "top_p", "p": 1.0}, r"p=1\.0: scores sum to 1"),
    (
        {"kind": "expert_choice"},
        r"router=expert_choice with model.moe.router.non_causal=false: choices depend",
    ),
    ({"kind": "expert_choice", "factor": 0.0}, r"factor=0\.0: has to be above 0"),
    ({"kind": "sinkhorn", "iterations": 0}, r"iterations=0: has to be at least 1"),
    ({"kind": "sinkhorn", "tolerance": -1.0}, r"tolerance=-1\.0: use 0 or more"),
    ({"kind": "top_p", "top_k": 9}, r"top_k=9 is more than model\.moe\.num_experts=8"),
]


@pytest.mark.parametrize(("router", "said"), REFUSED, ids=str)
def test_what_cannot_be_meant_is_refused_in_one_line(router, said) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check(load({"model": {"moe": {"router": router}}, "layout": {"dp": 1}}, Config), world=1)
    assert "\n" not in str(caught.value)
