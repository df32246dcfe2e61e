"""Out and back: whatever is routed wherever, each token gets its kept experts' sum, and a gradient of the same; random
shapes, capacities, placements and loads, float64."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from drawn import ALL, commit
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import comm
from moetrain.config import OPTIONS, load
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.moe.rows import gather, gather_sum
from moetrain.moe.placement.types import Placement
from moetrain.moe.types import Dispatcher, Routing, Slots, Tokens

D = 3


def option(kind: str, **keys) -> Dispatcher:
    return load({"kind": kind} | keys, Dispatcher)


@dataclass(frozen=True)
class Case:
    """``slots_RS`` of the ep ranks, each etp times; ``ids_RTK`` -1 = none; every rank has ``sequences`` of T."""

    etp: int
    slots_RS: list[list[int]]
    ids_RTK: Tensor
    weights_RTK: Tensor
    sequences: int
    num_experts: int


@st.composite
def cases(draw, world: int) -> Case:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    etp = pick(*(n for n in (1, 2, 4) if world % n == 0))
    ep = world // etp
    E = draw(st.integers(1, 7))
    luck = random.Random(draw(st.integers(0, 999)))
    held: list[list[int]] = [[] for _ in range(ep)]  # uneven, in any order, some ranks with none, some experts twice
    for e in luck.sample(range(E), E):
        held[luck.randrange(ep)].append(e)
    for _ in range(draw(st.integers(0, 2))):
        e, rank = luck.randrange(E), luck.randrange(ep)
        held[rank] += [e] * (e not in held[rank])
    S = max(map(len, held))
    K, sequences = draw(st.integers(1, min(3, E))), draw(st.integers(1, 3))
    T = sequences * draw(st.integers(0, 5))
    load = pick("any", "one expert", "some experts", "few tokens", "a rank without")
    favourites = luck.sample(range(E), K if load == "one expert" else max(K, E // 2))
    ids = torch.full((world, T, K), -1)
    for r in range(world):
        for t in range(T):
            if (load == "few tokens" and luck.random() < 0.7) or (load == "a rank without" and r == world - 1):
                continue
            among = favourites if load in ("one expert", "some experts") else range(E)
            ids[r, t] = torch.tensor(luck.sample(among, K))
    weights = torch.tensor([luck.randint(1, 9) / 4 for _ in range(ids.numel())], dtype=torch.float64)
    slots = [[*experts, *[-1] * (S - len(experts))] for experts in held]
    return Case(etp, slots, ids, weights.view_as(ids), sequences, E)


def dispatchers(world: int) -> st.SearchStrategy[Dispatcher]:
    """Every option as it is; of those with settings, more."""
    limited = st.builds(
        option, st.just("capacity"), factor=st.sampled_from([0.1, 0.5, 1.0, 100.0]), min_capacity=st.sampled_from([0, 0, 2]),
        drop=st.sampled_from(["position", "probability", "random"]), scope=st.sampled_from(["sequence", "local"]),
    )  # fmt: skip
    nodes = st.sampled_from([n for n in (1, 2, 4) if world % n == 0]).map(
        lambda n: option("hierarchical", ranks_per_node=n)
    )
    return st.one_of(st.sampled_from([cls() for cls in OPTIONS["dispatcher"].values()]), limited, nodes)


def x_of(rank: int, case: Case, name: int) -> Tensor:
    T = case.ids_RTK.shape[1]
    return torch.sin(torch.arange(1, T * D + 1, dtype=torch.float64) * (name + rank + 1)).view(T, D)


def there_and_back(rank: int, world: int, case: Case, dispatcher: Dispatcher) -> dict[str, Tensor]:
    """Expert e multiplies by e + 1, of which each of its etp ranks does a part."""
    ep = world // case.etp
    mesh = Mesh.build(Layout(dp=world, ep=ep, etp=case.etp), rank=rank, world=world, device=torch.device("cpu"))
    owner_E = torch.zeros(case.num_experts, dtype=torch.int64)
    placement, at = Placement(torch.tensor(case.slots_RS), owner_E, span=ep), mesh.index("moe", "ep")
    x_TD, ids_TK = x_of(rank, case, 0).requires_grad_(), case.ids_RTK[rank]
    weights_TK = case.weights_RTK[rank].clone().requires_grad_()
    scores_TE = torch.zeros(len(x_TD), case.num_experts, dtype=torch.float64)
    routing = Routing(scores_TE, scores_TE, ids_TK, weights_TK, ragged=bool((ids_TK < 0).any()))
    B = case.sequences
    tokens = Tokens(B, torch.arange(len(x_TD) // B), sample_B=torch.arange(B) + rank * B, key=(0, 1, 2))
    target_EJ = placement.target_EJ(at, x_TD.device, etp=case.etp)
    slots = Slots(target_EJ, placement.num_slots, mesh.group("moe", "ep", "etp"))
    rows, ticket = dispatcher.dispatch(x_TD, routing, tokens=tokens, slots=slots)
    x_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    starts_S = torch.cat([rows.offsets_S.new_zeros(1), rows.offsets_S])[:-1]
    scale_M = torch.full((len(x_MD),), torch.nan, dtype=torch.float64)  # past the last row: nobody reads it
    for expert, start, end in zip(case.slots_RS[at], starts_S.tolist(), rows.offsets_S.tolist(), strict=True):
        scale_M[start:end] = (expert + 1) / case.etp
    y_MD = x_MD * (rows.weights_M * scale_M)[:, None]
    y_ND = gather_sum(y_MD, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    y_TD = dispatcher.combine(y_ND, ticket)
    y_TD.backward(x_of(rank, case, 7))
    count = rows.offsets_S[-1:].long().clone()
    dropped_E = torch.zeros(case.num_experts, dtype=torch.int64) if rows.dropped_E is None else rows.dropped_E
    return {
        "y": y_TD.detach(), "grad x": x_TD.grad, "grad weights": weights_TK.grad, "dropped": dropped_E,
        "rows": comm.all_reduce_(count, group=slots.group), "drops": torch.tensor(rows.dropped_E is not None),
    }  # pyright: ignore  # fmt: skip


def kept(case: Case, dispatcher, rank: int) -> Tensor:
    """(T, K) bool, in loops. Random drops are anybody's guess: None of them is wrong if the counts are right."""
    ids_TK, weights_TK = case.ids_RTK[rank], case.weights_RTK[rank]
    T, K = ids_TK.shape
    keep_TK = ids_TK >= 0
    if type(dispatcher) is not OPTIONS["dispatcher"]["capacity"]:
        return keep_TK
    scopes = [range(T)] if dispatcher.scope.value == "local" else torch.arange(T).view(case.sequences, -1).tolist()
    for scope in scopes:
        limit = max(dispatcher.min_capacity, math.ceil(dispatcher.factor * len(scope) * K / case.num_experts))
        for e in range(case.num_experts):
            asking = [(t, k) for t in scope for k in range(K) if ids_TK[t, k] == e]
            if dispatcher.drop.value == "probability":
                asking.sort(key=lambda at: -weights_TK[at])
            for t, k in asking[limit:]:
                keep_TK[t, k] = False
    return keep_TK


def several(rank: int, world: int, trips: list[tuple[Case, Dispatcher]]) -> list[dict[str, Tensor]]:
    return [there_and_back(rank, world, *trip) for trip in trips]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_token_gets_the_sum_of_its_kept_experts(ranks, world) -> None:
    pool = ranks(world)

    @seed(commit())
    @settings(
        max_examples=100 if ALL else 12, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(st.tuples(cases(world), dispatchers(world)), min_size=1, max_size=8))
    def same(trips: list[tuple[Case, Dispatcher]]) -> None:
        for trip, *found in zip(trips, *pool.run(several, trips), strict=True):
            check(*trip, found)

    same()


def check(case: Case, dispatcher, found: list[dict[str, Tensor]]) -> None:
    arrived = 0
    for rank, got in enumerate(found):
        ids_TK, weights_TK, keep_TK = case.ids_RTK[rank], case.weights_RTK[rank], kept(case, dispatcher, rank)
        dropped_E = torch.tensor([int(((ids_TK == e) & ~keep_TK).sum()) for e in range(case.num_experts)])
        assert torch.equal(got["dropped"], dropped_E)
        x_TD, g_TD, scale_TK = x_of(rank, case, 0), x_of(rank, case, 7), ids_TK + 1.0
        if dropped_E.any() and dispatcher.drop.value == "random":
            keep_TK = (got["grad weights"] != 0) & (ids_TK >= 0)  # whom it kept: as many
            assert [int(((ids_TK == e) & ~keep_TK).sum()) for e in range(case.num_experts)] == dropped_E.tolist()
        sum_T1 = (weights_TK * scale_TK * keep_TK).sum(1, keepdim=True)
        assert torch.allclose(got["y"], sum_T1 * x_TD, rtol=1e-12, atol=1e-12)
        assert torch.allclose(got["grad x"], sum_T1 * g_TD, rtol=1e-12, atol=1e-12)
        inner_T1 = (x_TD * g_TD).sum(1, keepdim=True)
        assert torch.allclose(got["grad weights"], inner_T1 * scale_TK * keep_TK, rtol=1e-12, atol=1e-12)
        arrived += int(keep_TK.sum()) * case.etp
    if not found[0]["drops"]:
        assert {int(got["rows"]) for got in found} == {arrived}, "each assignment is a row on etp ranks, no more"


def uneven(rank: int, world: int, dispatcher: Dispatcher) -> float:
    """Ranks with 0, 3, 6 ... tokens: for dispatchers that send what there is."""
    T, E = 3 * rank, 4
    ids = (torch.arange(T)[:, None] + torch.tensor([[0, 1, 2]])) % E
    case = Case(1, [[2 * r, 2 * r + 1] for r in range(E // 2)] if world == 2 else [[e] for e in range(E)],
                ids.expand(world, -1, -1), torch.ones(world, T, 3, dtype=torch.float64), 1, E)  # fmt: skip
    got = there_and_back(rank, world, case, dispatcher)
    want = (ids + 1.0).sum(1, keepdim=True) * x_of(rank, case, 0)
    return float((got["y"] - want).abs().sum())


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_may_hold_different_numbers_of_tokens(ranks, world) -> None:
    for dispatcher in (option("dropless"), option("hierarchical", ranks_per_node=2)):
        assert max(ranks(world).run(uneven, dispatcher)) < 1e-12


def cut(rank: int, world: int, case: Case, dispatcher: Dispatcher, B: int) -> Tensor:
    """(B, S, E) of what this rank holds of sequences dealt in zigzag: 1 where an expert is kept, zero elsewhere."""
    chunk = case.ids_RTK.shape[1] // B // (2 * world)
    pieces = [torch.arange(i * chunk, (i + 1) * chunk) for i in (rank, 2 * world - 1 - rank)]
    position_S, S = torch.cat(pieces), case.ids_RTK.shape[1] // B
    mask_BS = torch.arange(S)[None] < torch.tensor([S, S - 3, S])[:B, None]
    take = lambda x: x.view(B, S, -1)[:, position_S].flatten(0, 1)  # noqa: E731
    mask_T = take(mask_BS)[:, 0]
    ids_TK = torch.where(mask_T[:, None], take(case.ids_RTK[0]), -1)
    weights_TK = take(case.weights_RTK[0]).clone().requires_grad_()
    group = None if world == 1 else torch.distributed.group.WORLD
    tokens = Tokens(
        B, position_S, 2, mask_T, group, sample_B=torch.arange(B) + 5, key=(1, 2, 3),
    )  # fmt: skip
    E = case.num_experts
    scores_TE = torch.zeros(len(ids_TK), E, dtype=torch.float64)
    routing = Routing(scores_TE, scores_TE, ids_TK, weights_TK, ragged=True)
    x_TD = torch.ones(len(ids_TK), D, dtype=torch.float64)
    rows, ticket = dispatcher.dispatch(
        x_TD, routing, tokens=tokens, slots=Slots(torch.arange(E)[:, None], E)
    )
    y_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged) * rows.weights_M[:, None]
    y_ND = gather_sum(y_MD, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    dispatcher.combine(y_ND, ticket).sum().backward()
    assert weights_TK.grad is not None
    kept_TE = torch.zeros(len(ids_TK), E + 1).scatter_(1, ids_TK.clamp_min(0), (weights_TK.grad > 0).float())[:, :E]
    whole = torch.zeros(B, S, E)
    whole[:, position_S] = kept_TE.view(B, -1, E)
    assert rows.dropped_E is not None
    assert int(rows.dropped_E.sum()) == int((ids_TK >= 0).sum() - kept_TE.sum())
    return whole


@pytest.mark.parametrize("drop", ["position", "probability", "random"])
def test_the_same_is_dropped_however_a_sequence_is_cut(ranks, drop) -> None:
    B, S, E, K = 3, 16, 5, 2
    luck = torch.Generator().manual_seed(3)
    ids = torch.rand(B * S, E, generator=luck).mul(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])).topk(K).indices
    weights = torch.randint(1, 6, ids.shape, generator=luck).double()  # with ties, which go by position
    case = Case(1, [], ids[None], weights[None], B, E)
    capacity = option("capacity", factor=0.75, drop=drop, min_capacity=4)
    alone = ranks(1).run(cut, case, capacity, B)[0]
    assert int(alone.sum()) == sum(
        min(max(4, math.ceil(0.75 * n * K / E)), int((ids.view(B, S, K)[b, :n] == e).sum()))
        for b, n in enumerate((S, S - 3, S)) for e in range(E)
    )  # fmt: skip
    for world in (2, 4):
        assert torch.equal(sum(ranks(world).run(cut, case, capacity, B)), alone)


def test_random_drops_differ_by_step_and_are_even_over_positions() -> None:
    capacity = option("capacity", factor=1.0, drop="random")
    B, S = 400, 8
    scores_TE = torch.zeros(B * S, 2, dtype=torch.float64)
    ids_TK = torch.zeros(B * S, 1, dtype=torch.int64)  # all ask for one of two experts: half are kept
    routing = Routing(scores_TE, scores_TE, ids_TK, torch.ones(B * S, 1, dtype=torch.float64))

    def keep(tokens: Tokens) -> Tensor:
        return capacity._place(routing, tokens, capacity._first(routing, tokens))[1].view(B, S)

    tokens = Tokens(B, torch.arange(S), sample_B=torch.arange(B), key=(0, 0, 0))
    one, again, other = keep(tokens), keep(tokens), keep(replace(tokens, key=(0, 1, 0)))
    assert torch.equal(one, again)
    assert (one != other).float().mean() > 0.3
    assert one.sum(1).eq(S // 2).all()
    assert (one.float().mean(0) - 0.5).abs().max() < 0.13, "5 deviations of a mean of 400"


def test_evaluation_may_have_another_capacity_and_local_counts_all_tokens_together() -> None:
    ids_TK = torch.tensor([[0]] * 4 + [[1]] * 4)  # two sequences: one all to expert 0, one all to expert 1
    scores_TE, weights = torch.zeros(8, 2, dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64)
    routing, x_TD = Routing(scores_TE, scores_TE, ids_TK, weights), torch.ones(8, D, dtype=torch.float64)

    def dropped(training: bool = True, **keys) -> list[int]:
        tokens, slots = Tokens(2, torch.arange(4), training=training), Slots(torch.arange(2)[:, None], 2)
        rows, _ = option("capacity", **keys).dispatch(x_TD, routing, tokens=tokens, slots=slots)
        return rows.dropped_E.tolist()

    assert dropped(factor=1.0) == [2, 2]
    assert dropped(factor=1.0, scope="local") == [0, 0]
    assert dropped(factor=0.5, scope="local") == [2, 2]
    assert dropped(factor=0.5, min_capacity=3) == [1, 1]
    assert dropped(training=False, factor=0.5) == [3, 3]
    assert dropped(training=False, factor=0.5, eval_factor=2.0) == [0, 0]
    assert dropped(factor=0.5, eval_factor=2.0) == [3, 3]
