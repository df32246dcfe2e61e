"""Zero-computation experts against plain loops: outputs, every gradient, balance losses, capacity; all in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import counter
from moetrain.cli.compose import compose
from moetrain.config import OPTIONS, UserError, load
from moetrain.config import replace as with_keys
from moetrain.job import Config, check
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.model.flops import flops_per_token, layer_flops, size
from moetrain.model.init import initialize
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.routers.topk import Score, TopK
from moetrain.moe.types import Context, Tokens
from moetrain.moe.zero_computation import KINDS, ZeroComputationConfig
from moetrain.parallel import state
from moetrain.parallel.plan import whole
from moetrain.telemetry.health import Health, HealthConfig
from moetrain.verify.shrink import shrink

B, S, D, E, FFN = 3, 8, 6, 4, 5
T = B * S
Parameters = dict[str, Tensor]
OUTPUT = {  # kind -> what the j-th of it makes of a token
    "zero": lambda x_D, p, j: 0 * x_D,
    "copy": lambda x_D, p, j: x_D,
    "constant": lambda x_D, p, j: constant(x_D, p[f"constants.{j}.mix"], p[f"constants.{j}.vector"]),
    "nulls": lambda x_D, p, j: 0 * x_D,
}


def constant(x_D: Tensor, mix_2D: Tensor, vector_D: Tensor) -> Tensor:
    a, b = (sum(w * x for w, x in zip(row, x_D, strict=True)) for row in mix_2D)
    largest = max(a.item(), b.item())  # pyright: ignore
    e_a, e_b = (a - largest).exp(), (b - largest).exp()  # pyright: ignore
    return e_a / (e_a + e_b) * x_D + e_b / (e_a + e_b) * vector_D


def kinds_of(extra: ZeroComputationConfig) -> list[tuple[str, int]]:
    """Kind and number of each choice past the experts."""
    return [(kind, j) for kind in KINDS for j in range(getattr(extra, kind))]


def truth(x_TD: Tensor, p: Parameters, extra: ZeroComputationConfig, ids_TK: Tensor, router: TopK, keep=None) -> Tensor:
    """Plain loops over tokens and their choices. ``keep``: (token, expert) that were not dropped."""
    rows = []
    for t, x_D in enumerate(x_TD):
        logits_C = p["gate.weight"] @ x_D
        scores_C = logits_C.softmax(0) if router.score is Score.softmax else logits_C.sigmoid()
        chosen = [c for c in ids_TK[t].tolist() if c >= 0]
        weight = {c: scores_C[c] for c in chosen}
        if router.renormalize:
            weight = {c: w / sum(weight.values()) for c, w in weight.items()}
        weight = {c: router.scale * w for c, w in weight.items()}
        true = [c for c in chosen if c < len(p["gate.weight"]) - extra.nulls]
        total = sum(weight.values())
        y_D = torch.zeros_like(x_D)
        for c in true:
            w = weight[c] * total / sum(weight[e] for e in true) if extra.nulls else weight[c]
            if c < E:
                gate_F, up_F = p["experts.gate_up"][c, 0] @ x_D, p["experts.gate_up"][c, 1] @ x_D
                if keep is None or (t, c) in keep:
                    y_D = y_D + w * (p["experts.down"][c] @ (F.silu(gate_F) * up_F))
            else:
                kind, j = kinds_of(extra)[c - E]
                y_D = y_D + w * OUTPUT[kind](x_D, p, j)
        rows.append(y_D)
    return torch.stack(rows)


def layer_of(extra: ZeroComputationConfig, *, router: TopK, **more) -> MoE:
    layer = MoE(
        MoEConfig(num_experts=E, hidden=FFN, router=router, zero_computation=extra, **more), dim=D, layer=0
    ).double()
    with torch.no_grad():
        for n, p in layer.named_parameters():
            counter.fill_normal_(p, shape=p.shape, offsets=(0,) * p.dim(), key=counter.key(3, n), std=0.8)
    return layer


def context(**more) -> Context:
    return Context(step=0, micro_batch=0, sample_B=torch.arange(B), position_S=torch.arange(S), routed_tokens=T, **more)


def tokens() -> Tensor:
    return torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


def named(layer: MoE) -> Parameters:
    return {n.removeprefix("zero_computation."): p for n, p in layer.named_parameters()}


def compare(got: Tensor, want: Tensor, leaves: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    mine = torch.autograd.grad(got, list(leaves.values()), g)
    truths = torch.autograd.grad(want, list(leaves.values()), g, allow_unused=True)
    for name, a, b in zip(leaves, mine, truths, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-12, msg=name)


EXTRAS = {
    **{kind: ZeroComputationConfig(**{kind: 2}) for kind in KINDS},
    "one constant": ZeroComputationConfig(constant=1),
    "all": ZeroComputationConfig(zero=1, copy=2, constant=3, nulls=2),
    "zero, nulls": ZeroComputationConfig(zero=1, nulls=3),
}
ROUTERS = {
    "top-2": TopK(top_k=2),
    "top-4, sigmoid, scaled": TopK(top_k=4, score=Score.sigmoid, scale=2.5),
    "top-3, weights as they are": TopK(top_k=3, renormalize=False),
}


def test_every_kind_has_a_truth() -> None:
    assert OUTPUT.keys() == set(KINDS) == {f for f in vars(ZeroComputationConfig()) if f not in ("weight", "_sealed")}
    assert set(EXTRAS) >= set(KINDS)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_outputs_and_every_gradient_equal_plain_loops(extra: ZeroComputationConfig, router: TopK) -> None:
    layer, x_BSD, ids = layer_of(extra, router=router), tokens(), {}
    y_BSD, _ = layer(x_BSD, {}, context(ids=ids, scores={}))
    ids_TK = ids[0].flatten(0, 1)
    load_C = ids_TK.flatten().bincount(minlength=E + extra.total)
    assert (load_C[:E] > 0).any()
    assert (load_C[E:] > 0).any(), "the case says something about zero-computation experts"
    assert layer.load_ME[0].tolist() == load_C.tolist()
    want = truth(x_BSD.flatten(0, 1), named(layer), extra, ids_TK, router)
    compare(y_BSD.flatten(0, 1), want, named(layer) | {"x": x_BSD})


@pytest.mark.parametrize("name", OPTIONS["dispatcher"])
def test_every_dispatcher_sends_experts_only(name) -> None:
    extra, router = EXTRAS["all"], TopK(top_k=3)
    more = {"factor": 64.0} if name == "capacity" else {}
    dispatcher = load({"kind": name} | more, OPTIONS["dispatcher"][name])
    layer, x_BSD, ids = layer_of(extra, router=router, dispatcher=dispatcher), tokens(), {}
    y_BSD, _ = layer(x_BSD, {}, context(ids=ids, scores={}))
    ids_TK = ids[0].flatten(0, 1)
    want = truth(x_BSD.flatten(0, 1), named(layer), extra, ids_TK, router)
    compare(y_BSD.flatten(0, 1), want, named(layer) | {"x": x_BSD})


@pytest.mark.parametrize("name", [n for n in OPTIONS["router"] if n not in ("expert_choice", "replay")])
def test_every_router_by_which_tokens_choose(name) -> None:
    """Of a router that is none of the plain ones, the weights are its own."""
    extra = ZeroComputationConfig(zero=1, copy=1, constant=1, nulls=1)
    more = {"num_groups": 4, "max_groups": 3} if name == "group_limited" else {}
    router = load({"kind": name, "top_k": 3} | more, OPTIONS["router"][name])
    layer, x_BSD = layer_of(extra, router=router), tokens()
    layer.cfg.check()
    y_BSD, _ = layer(x_BSD, {}, context())
    logits_TC, _ = layer.gate(x_BSD.flatten(0, 1), {})
    routing = router(logits_TC, layer.bias_E, ctx=context(), layer=0)
    rows, p, null = [], named(layer), E + extra.total - 1
    for x_D, ids_K, weights_K in zip(x_BSD.flatten(0, 1), routing.ids_TK.tolist(), routing.weights_TK, strict=True):
        true = [(c, w) for c, w in zip(ids_K, weights_K, strict=True) if 0 <= c < null]
        share = sum(w for c, w in zip(ids_K, weights_K, strict=True) if c >= 0) / (sum(w for _, w in true) or 1)
        y_D = torch.zeros_like(x_D)
        for c, w in true:
            if c < E:
                gate_up_2FD = p["experts.gate_up"][c]
                y_D = y_D + share * w * (p["experts.down"][c] @ (F.silu(gate_up_2FD[0] @ x_D) * (gate_up_2FD[1] @ x_D)))
            else:
                y_D = y_D + share * w * OUTPUT[kinds_of(extra)[c - E][0]](x_D, p, 0)
        rows.append(y_D)
    compare(y_BSD.flatten(0, 1), torch.stack(rows), p | {"x": x_BSD})


def steered(extra: ZeroComputationConfig, first: int, last: int) -> tuple[MoE, Tensor, Tensor]:
    """A layer whose tokens all choose among ids ``first`` to ``last``."""
    layer, x_BSD = layer_of(extra, router=TopK(top_k=2)), tokens()
    layer.bias_E[first:last] = 10.0
    y_BSD, _ = layer(x_BSD, {}, context())
    y_BSD.square().sum().backward()
    return layer, x_BSD, y_BSD


def test_a_token_of_null_experts_only_is_zero_and_so_are_all_gradients() -> None:
    layer, x_BSD, y_BSD = steered(ZeroComputationConfig(copy=1, constant=2, nulls=2), E + 3, E + 5)
    assert layer.load_ME[0].tolist() == [0] * (E + 3) + [T, T]
    assert y_BSD.abs().max() == 0
    for leaf in (x_BSD, *layer.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() == 0


def test_who_is_not_chosen_has_a_gradient_of_exactly_zero() -> None:
    layer, _, _ = steered(ZeroComputationConfig(copy=2, constant=2), E, E + 2)
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert (p.grad.abs().max() == 0) == (name != "gate.weight"), name
    layer, _, _ = steered(ZeroComputationConfig(copy=1, constant=2), E, E + 2)
    assert {n for n, p in named(layer).items() if p.grad.abs().max() > 0} == {  # pyright: ignore
        "gate.weight", "constants.0.mix", "constants.0.vector",
    }  # fmt: skip


def test_padding_reaches_nobody() -> None:
    extra, router = EXTRAS["all"], TopK(top_k=3)
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    mask_BS[1, 3:], mask_BS[2] = False, False
    layer, clean, ids = layer_of(extra, router=router), tokens(), {}
    x_BSD = torch.where(mask_BS[:, :, None], clean.detach(), torch.nan).requires_grad_()
    y_BSD, _ = layer(x_BSD, {}, context(mask_BS=mask_BS, ids=ids, scores={}))
    assert y_BSD[~mask_BS].abs().max() == 0
    assert layer.load_ME[0].sum() == 3 * mask_BS.sum()
    want = truth(x_BSD[mask_BS], named(layer), extra, ids[0][mask_BS], router)
    leaves = {n: p for n, p in named(layer).items() if n != "gate.weight"}  # whose rows see x itself
    compare(y_BSD[mask_BS], want, leaves)


@pytest.mark.parametrize("weight", [1.0, 0.75])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_is_that_of_moe_plus_plus_and_nothing_stays_behind(weight, padded) -> None:
    """Capacity = factor * tau * S * K / (tau * N_F + N_Z), a sequence; a null expert counts as one more N_F."""
    extra, router = with_keys(EXTRAS["all"], weight=weight), TopK(top_k=3)
    capacity = OPTIONS["dispatcher"]["capacity"](factor=0.6)
    layer, x_BSD, ids = layer_of(extra, router=router, dispatcher=capacity), tokens(), {}
    layer.bias_E[:2] = 0.3
    mask_BS = None
    if padded:
        mask_BS = torch.ones(B, S, dtype=torch.bool)
        mask_BS[1, 3:] = False
    y_BSD, _ = layer(x_BSD, {}, context(ids=ids, scores={}, mask_BS=mask_BS))
    ids_TK, keep, dropped = ids[0].flatten(0, 1), set(), [0] * (E + extra.total)
    for b in range(B):
        real = S if mask_BS is None else int(mask_BS[b].sum())
        experts, others = E + extra.nulls, extra.zero + extra.copy + extra.constant
        most = math.ceil(0.6 * weight * real * 3 / (weight * experts + others) - 1e-9)
        for e in range(E):
            who = [t for t in range(b * S, (b + 1) * S) if e in ids_TK[t].tolist()]
            keep |= {(t, e) for t in who[:most]}
            dropped[e] += len(who[most:])
    assert sum(dropped) > 0
    assert layer.dropped_ME[0].tolist() == dropped
    want = truth(x_BSD.flatten(0, 1), named(layer), extra, ids_TK, router, keep)
    compare(y_BSD.flatten(0, 1), want, named(layer) | {"x": x_BSD})


def shares(ids_TK: Tensor, extra: ZeroComputationConfig) -> list[float]:
    """f_i of every choice: its share of assignments, for null experts the mean of theirs."""
    ids = [c for row in ids_TK.tolist() for c in row]
    nulls = range(E + extra.total - extra.nulls, E + extra.total)
    f = [ids.count(c) / len(ids) for c in range(E + extra.total)]
    level = sum(f[c] for c in nulls) / max(1, len(nulls))
    return [level if c in nulls else f[c] for c in range(E + extra.total)]


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("term", ["switch", "sequence", "device", "communication"])
def test_balance_losses_equal_their_formulas(extra, term) -> None:
    """MoE++'s sum_i eta_i f_i P_i, AdaMoE's mean over null experts, both times the number of choices."""
    extra, C = with_keys(extra, weight=0.75), E + extra.total
    layer, x_BSD = layer_of(extra, router=TopK(top_k=3)), tokens()
    logits_TC = layer.gate(x_BSD.flatten(0, 1), {})[0].detach().requires_grad_()
    routing = TopK(top_k=3)(logits_TC, layer.bias_E, ctx=context(), layer=0)
    groups = {"device": 1 if C % 2 else 2, "communication": C}
    keys = {"num_groups": groups[term]} if term in groups else {}
    keys |= {"max_groups": 3} if term == "communication" else {}
    got = OPTIONS["balance"][term](**keys).loss(replace(routing, zero_computation=extra), Tokens(B, torch.arange(S)))
    P_TC, want = logits_TC.softmax(1), torch.zeros((), dtype=torch.float64)
    eta = [extra.weight if E <= c < C - extra.nulls else 1.0 for c in range(C)]
    scopes = [range(b * S, (b + 1) * S) for b in range(B)] if term == "sequence" else [range(T)]
    for scope in scopes:
        f, G = shares(routing.ids_TK[list(scope)], extra), groups.get(term, 1)
        if term in ("switch", "sequence"):
            want = want + C * sum(eta[c] * f[c] * P_TC[t, c] for t in scope for c in range(C))
        elif term == "device":
            for run in (range(g * C // G, (g + 1) * C // G) for g in range(G)):
                want = want + G * sum(f[c] for c in run) * sum(eta[c] * P_TC[t, c] for t in scope for c in run)
        else:  # groups of one choice each
            load_C = routing.ids_TK.flatten().bincount(minlength=C).tolist()
            want = want + C / 3 * sum(load_C[c] / T * eta[c] * P_TC[t, c] for t in scope for c in range(C))
    compare(got, want, {"logits": logits_TC})


def test_even_load_costs_the_number_of_tokens_at_weight_one() -> None:
    extra = ZeroComputationConfig(zero=1, copy=1, nulls=2)
    logits_TC = torch.zeros(8, 8, dtype=torch.float64).fill_diagonal_(1e-9)
    routing = TopK(top_k=1, renormalize=False)(
        logits_TC, torch.zeros(8, dtype=torch.float64), ctx=replace(context(), sample_B=torch.arange(1)), layer=0
    )
    loss = OPTIONS["balance"]["switch"]().loss(replace(routing, zero_computation=extra), Tokens(1, torch.arange(8)))
    assert loss.item() == pytest.approx(8)


def test_health_shows_all_loads_and_judges_experts_by_their_own() -> None:
    extra = ZeroComputationConfig(copy=1, nulls=1)
    layer = layer_of(extra, router=TopK(top_k=2))
    layer.begin_step(1, watch=True, pairs=True)
    layer.load_ME[0] = torch.tensor([4, 2, 1, 1, 6, 2])
    layer.dropped_ME[0, 0] = 2
    mesh = Mesh.build(Layout(dp=1), rank=0, world=1, device=torch.device("cpu"))
    health = Health(HealthConfig(), layers={0: layer.cfg}, mesh=mesh)
    health.smooth(layer.load_ME)
    found = health.read(health.brief(health.part([layer]), layer.load_ME).tolist(), tokens=8)
    values = found.layers[0]
    assert (values["drop_rate"], values["overload"], values["ffn_experts"]) == (2 / 8, 1.0, 1.0)
    assert values["max_violation"] == pytest.approx(6 / (16 / 6) - 1)
    assert len(found.load[0]) == 6


MODEL = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 64}


def model(**extra) -> ModelConfig:
    moe = {"num_experts": 4, "hidden": 16, "router": {"kind": "topk", "top_k": 3}, "zero_computation": extra}
    return load(MODEL | {"moe": moe}, ModelConfig)


def test_sizes_and_flops_count_what_experts_are_left() -> None:
    plain, more = model(), model(zero=1, copy=1, constant=2, nulls=4)
    with torch.device("meta"):
        counted = sum(p.numel() for p in Transformer(more).parameters())
    assert counted == size(more).total == size(plain).total + 2 * (8 * 32 + 2 * 3 * 32)
    expert, gates = 3 * 32 * 16, 8 * 32 + 2 * 3 * 32
    assert size(more).active == size(plain).active + 2 * (gates - 3 * expert + 3 * expert * 4 // 12)
    saved = 6 * 2 * (3 * expert - 3 * expert * 4 // 12 - gates)
    assert flops_per_token(plain, seq_len=8) - flops_per_token(more, seq_len=8) == saved
    assert layer_flops(plain)[0] - layer_flops(more)[0] == saved / 6


def test_weights_at_step_0_are_of_the_seed_and_the_name() -> None:
    def weights(count: int, seed: int) -> Parameters:
        cfg = model(constant=count)
        made = Transformer(cfg)
        initialize(state.parameters(made, whole(made)), cfg, seed=seed)
        return {n: p.detach() for n, p in made.named_parameters() if ".constants." in n}

    one, three, other = weights(1, 0), weights(3, 0), weights(1, 1)
    assert {n.split(".moe.")[1] for n in one} == {f"zero_computation.constants.0.{n}" for n in ("mix", "vector")}
    assert all(torch.equal(p, three[n]) for n, p in one.items())
    assert not any(torch.equal(p, other[n]) for n, p in one.items())
    assert len({p.flatten()[0].item() for p in three.values()}) == 12
    assert all(0 < p.std() < 0.05 for p in three.values())


REFUSED = [
    ({"zero_computation": {"nulls": -1}}, r"zero_computation\.nulls=-1: a number of experts, use 0 for none"),
    ({"zero_computation": {"weight": 0.0}}, r"model\.moe\.zero_computation\.weight=0\.0: has to be above 0 and finite"),
    ({"zero_computation": {"weight": math.inf}}, r"weight=inf: has to be above 0 and finite"),
    (
        {"zero_computation": {"copy": 2}, "router": {"kind": "topk", "top_k": 11}},
        r"top_k=11 is more than model\.moe\.num_experts=8 and the 2 of model\.moe\.zero_computation: use 1 to 10",
    ),
    ({"router": {"kind": "topk", "top_k": 9}}, r"top_k=9 is more than model\.moe\.num_experts=8: use 1 to 8"),
    (
        {"zero_computation": {"copy": 1}, "balance": {"device": {"kind": "device"}}},
        r"num_groups=2 does not divide .*=9: use one of \[1, 3, 9\] \(its experts are all 9 choices, 8 and 1 of",
    ),
    (
        {"zero_computation": {"nulls": 2}, "router": {"kind": "group_limited"}},
        r"num_groups=4 does not divide .*=10: .*8 and 2 of model\.moe\.zero_computation\)",
    ),
    (
        {"zero_computation": {"nulls": 2}, "router": {"kind": "expert_choice", "non_causal": True}},
        r"zero_computation has 2 nulls, with a router by which experts choose tokens: .* use router=topk",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("moe", "said"), REFUSED, ids=str)
def test_what_cannot_be_meant_is_refused_in_one_line(moe, said) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check(load({"model": {"moe": moe}, "layout": {"dp": 1}}, Config), world=1)
    assert "\n" not in str(caught.value)


def test_a_shrunk_model_keeps_one_or_two_of_each_kind() -> None:
    words = ["model=deepseek_moe_16b", "layout.dp=64", "layout.ep=8", "train.batch=64"]
    extra = [f"model.moe.zero_computation.{k}={n}" for k, n in {"zero": 1, "constant": 6, "nulls": 9}.items()]
    got = shrink(compose([*words, *extra, "model.moe.zero_computation.weight=0.75"]), world=64)
    assert got.lost == []
    assert got.cfg.model.moe.zero_computation == ZeroComputationConfig(zero=1, constant=2, nulls=2, weight=0.75)
    assert ("zero-computation experts", "1 zero, 6 constant, 9 nulls", "1 zero, 2 constant, 2 nulls") in got.rows
    got.cfg.model.moe.check()


def test_a_shrunk_model_keeps_as_many_as_its_groups_need() -> None:
    words = ["model=deepseek_moe_16b", "layout.dp=64", "layout.ep=8", "train.batch=64", "router=group_limited"]
    groups = ["model.moe.router.num_groups=8", "model.moe.router.max_groups=3", "model.moe.zero_computation.nulls=8"]
    small = shrink(compose([*words, *groups]), world=64).cfg.model.moe
    small.check()
    assert small.zero_computation.nulls == 8
    assert small.num_experts < 64
