"""Placement policies against loops over every rank and expert, every choice there is on small cases, and any load."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.config import UserError, dump, load
from moetrain.moe.placement.cost import Modelled, arrivals, modelled
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.replicate_all import ReplicateAll
from moetrain.moe.placement.shadow import Shadow
from moetrain.moe.placement.static import Static
from moetrain.moe.placement.travelling import check, check_owners, room
from moetrain.moe.placement.types import FREE, Costs, Grid, Placement, PlacementPolicy, deal

NODES = {1: (0,), 2: (0, 1), 3: (0,), 4: (0, 2), 6: (0, 2, 3), 8: (0, 2, 4), 12: (0, 3, 4)}
NOTHING = FSSDP(overlap=0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Grid, Costs]:
    """(E,) load, (E,) owners, a grid and costs."""
    ranks = draw(st.sampled_from(sorted(NODES)))
    edp = draw(st.sampled_from([d for d in range(1, ranks + 1) if ranks % d == 0]))
    grid = Grid(edp, ranks // edp, draw(st.sampled_from(NODES[ranks])), draw(st.none() | st.integers(0, 4)))
    loads = draw(st.lists(st.integers(0, 1000) | st.sampled_from([0, 500, 20000]), min_size=1, max_size=12))
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=len(loads), max_size=len(loads)))
    cost = st.sampled_from([0.0, 0.5, 3.0, 50.0, 2000.0])
    costs = Costs(draw(cost), draw(cost), draw(cost), draw(cost), draw(st.sampled_from([1.0, 1.5, float(ranks)])))
    return torch.tensor(loads), torch.tensor(owners), grid, costs


def holding(holders: list[set[int]], owner_E: Tensor, grid: Grid) -> Placement:
    slots = [[e for e, ranks in enumerate(holders) if r in ranks] for r in range(grid.ranks)]
    width = max(map(len, slots))
    table = torch.tensor([row + [-1] * (width - len(row)) for row in slots])
    return Placement(table, owner_E, span=grid.ranks, node=grid.node)


def hottest_everywhere(load_E: Tensor, owner_E: Tensor, grid: Grid, k: int) -> Placement | None:
    """None: there is no room."""
    hot = sorted(range(len(load_E)), key=lambda e: (-load_E[e], e))[:k]
    received = max(sum(owner_E[e] != r for e in hot) for r in range(grid.ranks))
    if grid.room is not None and received > grid.room:
        return None
    return holding(
        [set(range(grid.ranks)) if e in hot else {int(o)} for e, o in enumerate(owner_E)], owner_E, grid
    )  # fmt: skip


def routed(placement: Placement, load_E: Tensor, costs: Costs, *, travels: bool = True) -> tuple[float, ...]:
    """Rows, hops, sent, received and time, token by token as far as ranks and experts go."""
    R, E = placement.holds_RE.shape
    rows, away, arrived, sent, received = ([0.0] * R for _ in range(5))
    for r, e in itertools.product(range(R), range(E)):
        peer, share = int(placement.peer_RE[r, e]), float(load_E[e]) / R
        rows[peer] += share
        if peer != r:
            away[r] += share
            arrived[peer] += share
        owner = int(placement.owner_E[e])
        if travels and e in placement.slots_of(r) and owner != r:
            sent[owner] += 1
            received[r] += 1
    hops = max(away + arrived)
    turns = costs.shared / R  # of a processor's time: what all of its ranks do, one after the other
    busy, carried, moved = (max(*a, *b, turns * sum(a)) for a, b in ((rows, rows), (away, arrived), (sent, received)))
    time = costs.row * busy + costs.hop * carried + max(0.0, costs.expert * moved - costs.hidden)
    return max(rows), hops, max(sent), max(received), time


def replicas(placement: Placement) -> Tensor:
    """(E,) beyond each expert's owner."""
    return placement.holds_RE.sum(0) - 1


def time_of(policy: PlacementPolicy, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> float:
    return modelled(policy(load_E, owner_E, grid, costs), load_E, costs).time_us


def zipf(experts: int, ranks: int, *, seed: int, power: float = 1.0) -> Tensor:
    load_E = torch.arange(1.0, experts + 1, dtype=torch.float64) ** -power
    order_E = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    return (load_E / load_E.sum() * 1000 * ranks)[order_E]


@given(case=cases(), held=st.lists(st.sets(st.integers(0, 11)), min_size=12, max_size=12))
@settings(max_examples=80, deadline=None)
def test_the_model_is_the_routing_of_every_rank(case, held: list[set[int]]) -> None:
    load_E, owner_E, grid, costs = case
    holders = [{int(o)} | {r for r in held[e] if r < grid.ranks} for e, o in enumerate(owner_E)]
    placement = holding(holders, owner_E, grid)
    found = modelled(placement, load_E, costs)
    got = (found.rows, found.hops, found.sent, found.received, found.time_us)
    assert got == pytest.approx(routed(placement, load_E, costs), rel=1e-12, abs=1e-6)
    assert found.mean_rows == pytest.approx(float(load_E.sum()) / grid.ranks)
    E, R, (expert_X, rank_X) = len(load_E), grid.ranks, placement.holds_RE.t().nonzero().t().numpy()
    arrived_ER = torch.zeros(E, R).scatter_add_(1, placement.peer_RE.t(), torch.ones(E, R))
    assert arrivals(expert_X, rank_X, E, R, grid.node).tolist() == arrived_ER[expert_X, rank_X].tolist()


def test_ranks_that_share_a_processor_gain_less_by_evening_out() -> None:
    """4 ranks on two cores, one of which has half of all rows: the others keep the second core as long."""
    load_E, owner_E, grid = torch.tensor([300.0, 300.0, 200.0, 200.0, 200.0]), torch.tensor([0, 0, 1, 2, 3]), Grid(1, 4)
    alone = Costs(row=10.0, hop=0.0, expert=50.0, hidden=0.0)
    assert replicas(FSSDP()(load_E, owner_E, grid, alone)).sum() > 0
    assert replicas(FSSDP()(load_E, owner_E, grid, replace(alone, shared=2.0))).sum() == 0


def test_the_model_of_static_placement_moves_no_expert() -> None:
    grid, load_E, costs = Grid(edp=2, ep=2), torch.tensor([8.0, 0.0, 4.0, 4.0]), Costs(1.0, 1.0, 100.0, 0.0)
    placement = Static()(load_E, torch.zeros(4, dtype=torch.int64), grid, costs)
    found = modelled(placement, load_E, costs, travels=False)
    assert (found.sent, found.received, found.travel_us) == (0, 0, 0.0)
    assert (found.rows, found.hops, found.overload) == (4.0, 2.0, 1.0)
    assert modelled(placement, load_E, costs).travel_us > 0


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_fssdp_takes_the_best_of_all_that_it_knows(case) -> None:
    """Each candidate's time is the model's; among them every k hottest experts everywhere; the fewest replicas win."""
    load_E, owner_E, grid, costs = case
    plans = FSSDP().candidates(load_E, owner_E, grid, costs)
    for plan in plans:
        holders = [{int(o)} for o in owner_E]
        for e, holds_R in zip(plan.order_H.tolist(), plan.holds_HR, strict=True):
            assert holds_R[owner_E[e]]
            holders[e] = set(holds_R.nonzero()[0].tolist())
        placement = holding(holders, owner_E, grid)
        assert plan.time == pytest.approx(modelled(placement, load_E, costs).time_us, rel=1e-9, abs=1e-6)
        assert plan.replicas == replicas(placement).sum()
    everywhere = [hottest_everywhere(load_E, owner_E, grid, k) for k in range(len(load_E) + 1)]
    times = [modelled(p, load_E, costs).time_us for p in everywhere if p is not None]
    assert plans[0].time == pytest.approx(min(times), rel=1e-9, abs=1e-6)

    chosen = FSSDP()(load_E, owner_E, grid, costs)
    least = min(plan.time for plan in plans)
    assert modelled(chosen, load_E, costs).time_us == pytest.approx(least, rel=2e-9, abs=1e-6)
    assert replicas(chosen).sum() == min(p.replicas for p in plans if p.time <= least * (1 + 1e-9))


@pytest.mark.parametrize("costs", [FREE, Costs(1.0, 0.2, 5.0, 0.0), Costs(1.0, 0.2, 100.0, 0.0)])
def test_fssdp_is_near_the_best_of_all_placements(costs: Costs) -> None:
    """All ways to hold 3 experts on 4 ranks, 8 ** 3 of them, for 12 loads."""
    grid, owner_E = Grid(edp=1, ep=4), torch.tensor([0, 1, 2])
    subsets = [set(s) for n in range(5) for s in itertools.combinations(range(4), n)]
    every = [
        holding([{e} | s for e, s in enumerate(held)], owner_E, grid)
        for held in itertools.product(*([s for s in subsets if e not in s] for e in range(3)))
    ]
    assert len(every) == 512
    worse = []
    for seed in range(12):
        load_E = zipf(3, 4, seed=seed, power=seed / 4)
        best = min(modelled(p, load_E, costs).time_us for p in every)
        worse.append(time_of(FSSDP(), load_E, owner_E, grid, costs) / best)
    assert min(worse) >= 1 - 1e-9
    assert sum(worse) / len(worse) < 1.01
    assert max(worse) < 1.1


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_shadows_while_it_pays(case) -> None:
    load_E, owner_E, grid, costs = case
    taken, placement = 0, hottest_everywhere(load_E, owner_E, grid, 0)
    while placement is not None and taken < len(load_E):
        following = hottest_everywhere(load_E, owner_E, grid, taken + 1)
        if following is None:
            break
        now, then = (modelled(p, load_E, costs).time_us for p in (placement, following))
        if not then < now * (1 - 1e-9):
            break
        taken, placement = taken + 1, following
    assert placement is not None
    assert torch.equal(Shadow()(load_E, owner_E, grid, costs).holds_RE, placement.holds_RE)


@given(case=cases(), overlap=st.none() | st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_placements_are_legal_whatever_the_load(case, overlap: int | None) -> None:
    load_E, owner_E, grid, costs = case
    owners = owner_E.tolist()
    for policy in (FSSDP(overlap=overlap), Shadow(), ReplicateAll()):
        assert policy.travels
        placement = policy(load_E, owner_E, grid, costs)
        assert torch.equal(placement.owner_E, owner_E)
        assert placement.span == (1 if isinstance(policy, ReplicateAll) else grid.ranks)
        assert placement.node == grid.node
        slots = placement.slots_RS.tolist()
        assert max(len(placement.slots_of(r)) for r in range(grid.ranks)) == len(slots[0])
        for r, row in enumerate(slots):
            held = placement.slots_of(r)
            assert row == held + [-1] * (len(row) - len(held))
            assert len(set(held)) == len(held)
            own = [e for e in range(len(owners)) if owners[e] == r]
            assert held[: len(own)] == own
            assert held[len(own) :] == sorted(held[len(own) :], key=lambda e: (owners[e], e))
            if isinstance(policy, ReplicateAll):
                assert len(held) == len(owners)
            elif grid.room is not None:
                assert len(held) - len(own) <= grid.room
        if isinstance(policy, FSSDP) and overlap is not None:
            assert (replicas(placement) > 0).sum() <= overlap
        if not isinstance(policy, ReplicateAll):
            nothing = time_of(NOTHING, load_E, owner_E, grid, costs)
            assert modelled(placement, load_E, costs).time_us <= nothing * (1 + 2e-9)


def test_without_a_replica_only_owned_experts_are_held() -> None:
    owner_E = torch.tensor([1, 0, 1, 3, 2, 1])
    placement = NOTHING(torch.arange(6), owner_E, Grid(edp=2, ep=2), FREE)
    assert placement.slots_RS.tolist() == [[1, -1, -1], [0, 2, 5], [4, -1, -1], [3, -1, -1]]


@pytest.mark.parametrize(("node", "memory"), [(0, None), (2, None), (0, 3), (4, 3)])
def test_a_rank_with_ninety_percent_is_relieved(node: int, memory: int | None) -> None:
    grid, owner_E = Grid(edp=2, ep=4, node=node, room=memory), deal([16], 8)[0]
    load_E = torch.full((16,), 100.0)
    load_E[owner_E == 3] = 0.9 / 2 * 1400 / 0.1
    before = modelled(NOTHING(load_E, owner_E, grid, FREE), load_E, FREE)
    after = modelled(FSSDP()(load_E, owner_E, grid, FREE), load_E, FREE)
    assert before.overload == pytest.approx(0.9 * 8)
    assert after.overload < 1.1


def test_few_copies_do_where_every_rank_would_be_too_many() -> None:
    """One hot expert on 32 ranks: each copy is sent by its one owner."""
    load_E, owner_E = torch.full((32,), 100.0), deal([32], 32)[0]
    load_E[5] = 1600.0
    grid, costs = Grid(edp=1, ep=32, node=8), Costs(row=1.0, hop=0.0, expert=50.0, hidden=0.0)
    chosen = FSSDP()(load_E, owner_E, grid, costs)
    assert replicas(chosen).nonzero().flatten().tolist() == [5]
    assert 2 <= replicas(chosen)[5] <= 8
    best_everywhere = FSSDP().candidates(load_E, owner_E, grid, costs)[0].time
    assert modelled(chosen, load_E, costs).time_us < 0.7 * best_everywhere


def test_copies_go_to_other_nodes_first() -> None:
    load_E, owner_E, grid = torch.tensor([4000.0, 1, 1, 1, 1, 1, 1, 1]), torch.arange(8), Grid(edp=1, ep=8, node=2)
    placement = FSSDP()(load_E, owner_E, grid, Costs(row=1.0, hop=0.0, expert=10.0, hidden=30.0))
    assert placement.holds_RE[:, 0].view(4, 2).sum(1).min() >= 1


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_no_node_has_two_copies_while_another_has_none(case) -> None:
    load_E, owner_E, grid, costs = case
    grid = replace(grid, room=None)
    for plan in FSSDP().candidates(load_E, owner_E, grid, costs):
        node = grid.node or grid.ranks
        held_HN = plan.holds_HR.reshape(len(plan.order_H), grid.ranks // node, node).sum(2)
        for held_N in held_HN.tolist():
            assert max(held_N) <= 1 or min(held_N) >= 1


def test_copies_go_to_the_ranks_with_the_fewest_rows() -> None:
    owner_E, grid = torch.tensor([0, 1, 2, 3]), Grid(edp=2, ep=4)
    placement = FSSDP()(torch.full((4,), 100.0), owner_E, grid, Costs(row=1.0, hop=0.0, expert=10.0, hidden=10.0))
    assert placement.slots_RS[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert placement.num_slots == 1


@pytest.mark.parametrize("costs", [FREE, Costs(1.0, 0.0, 1.0, 100.0)])
def test_equal_loads_travel_nowhere(costs: Costs) -> None:
    for experts, ranks in ((8, 8), (16, 4), (4, 1)):
        load_E, owner_E, grid = torch.full((experts,), 7), deal([experts], ranks)[0], Grid(edp=1, ep=ranks)
        for policy in (FSSDP(), Shadow()):
            assert replicas(policy(load_E, owner_E, grid, costs)).sum() == 0


def test_what_travels_hidden_is_free_and_what_is_dear_stays() -> None:
    """Of the paper's Algorithm 1: t experts travel hidden, and a rank has room for m."""
    load_E, owner_E = zipf(16, 2, seed=0), deal([16], 2)[0]
    for hidden, memory in ((3, 8), (3, 3), (4, 2), (9, 1)):  # t <= m and t > m
        grid, costs = Grid(edp=1, ep=2, room=memory), Costs(row=1e-6, hop=1e-3, expert=1e3, hidden=hidden * 1e3)
        placement = FSSDP()(load_E, owner_E, grid, costs)
        found = modelled(placement, load_E, costs)
        assert max(found.sent, found.received) == min(hidden, memory)
        assert found.travel_us == 0
    assert replicas(FSSDP()(load_E, owner_E, grid, Costs(1e-6, 0.0, 1e3, 0.0))).sum() == 0


def test_experts_travel_beyond_what_is_hidden_where_it_pays() -> None:
    load_E, owner_E, grid = zipf(16, 8, seed=1), deal([16], 8)[0], Grid(edp=1, ep=8)
    found = modelled(FSSDP()(load_E, owner_E, grid, costs := Costs(1.0, 0.0, 20.0, 20.0)), load_E, costs)
    assert 0 < found.travel_us < modelled(NOTHING(load_E, owner_E, grid, costs), load_E, costs).time_us / 2


def test_short_of_room_replicas_follow_the_load() -> None:
    load_E, owner_E = torch.tensor([60.0, 24.0, 8.0, 4.0, 1.0, 1.0, 1.0, 1.0]), torch.arange(8)
    grid = Grid(edp=1, ep=8, room=1)
    placement = FSSDP()(load_E, owner_E, grid, FREE)
    assert replicas(placement).tolist() == [3, 1, 0, 0, 0, 0, 0, 0]
    assert modelled(placement, load_E, FREE).overload < 1.3


def test_ties_go_to_the_lower_id() -> None:
    load_E, owner_E, grid = torch.tensor([10.0, 500.0, 500.0, 10.0]), torch.tensor([0, 1, 1, 2]), Grid(edp=1, ep=4)
    copies = replicas(FSSDP(overlap=1)(load_E, owner_E, grid, FREE)).tolist()
    assert copies[1] > 0
    assert copies[2] == 0


@given(
    layers=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=5),
    ranks=st.sampled_from(sorted(NODES)),
    which=st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_ranks_own_equal_bytes(layers: list[list[int]], ranks: int, which: int) -> None:
    grid = Grid(edp=1, ep=ranks, node=NODES[ranks][which % len(NODES[ranks])])
    loads = [torch.tensor(row) for row in layers]
    for policy in (FSSDP(), Shadow(), ReplicateAll()):
        owners = policy.owners(loads, grid)
        check_owners(owners, [len(row) for row in layers], ranks)
        for upto in range(1, len(owners) + 1):
            count_R = torch.cat(owners[:upto]).bincount(minlength=ranks)
            assert count_R.max() - count_R.min() <= 1
    even = [torch.full((len(row),), float(row[0])) for row in layers]
    dealt = deal([len(row) for row in layers], ranks)
    assert all(map(torch.equal, FSSDP().owners(even, grid), dealt))


def test_sharding_by_load_beats_dealing() -> None:
    costs, grid = Costs(row=0.05, hop=0.01, expert=100.0, hidden=500.0), Grid(edp=2, ep=8, node=8)
    loads = [zipf(32, 16, seed=seed) * 30 for seed in range(6)]
    for policy, gain in ((NOTHING, 0.95), (FSSDP(), 0.95)):
        dealt, sharded = (
            sum(time_of(policy, load_E, o, grid, costs) for load_E, o in zip(loads, owners, strict=True))
            for owners in (deal([32] * 6, 16), FSSDP().owners(loads, grid))
        )
        assert sharded < gain * dealt


def test_sharding_pairs_the_heavy_with_the_light() -> None:
    load_E = torch.tensor([1.0, 40.0, 2.0, 30.0, 10.0, 3.0, 4.0, 10.0])
    owner_E = FSSDP().owners([load_E], Grid(edp=1, ep=4, node=2))[0]
    assert owner_E[[1, 3]].tolist() == [0, 2]  # the two hottest on two nodes
    assert sorted(owner_E[[0, 2]].tolist()) == [0, 2]  # and the two lightest with them
    sums = [float(load_E[owner_E == r].sum()) for r in range(4)]
    assert sums == [42.0, 13.0, 31.0, 14.0]


def test_plans_repeat() -> None:
    load_E, owner_E, grid = zipf(64, 16, seed=3), deal([64], 16)[0], Grid(edp=2, ep=8, node=4, room=5)
    costs = Costs(1.0, 0.1, 20.0, 50.0)
    for policy in (FSSDP(), Shadow(), ReplicateAll()):
        first, again = (policy(load_E.clone(), owner_E.clone(), grid, costs) for _ in range(2))
        assert torch.equal(first.slots_RS, again.slots_RS)
        first, again = (policy.owners([load_E.clone(), load_E * 2], grid) for _ in range(2))
        assert all(map(torch.equal, first, again))


def test_policies_survive_a_config_file() -> None:
    for policy in (FSSDP(window=3, memory=1.5, overlap=4, calibrate=True), Shadow(memory=2.0), ReplicateAll()):
        assert load(dump(policy), PlacementPolicy) == policy


@pytest.mark.parametrize(
    ("policy", "field", "value"),
    [
        (FSSDP, "window", 0), (Shadow, "window", -1), (FSSDP, "memory", 0.0), (Shadow, "memory", float("inf")),
        (FSSDP, "memory", float("nan")), (FSSDP, "reshard_every", -1), (FSSDP, "overlap", -1),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_named(policy, field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^model\.moe\.placement\.{field}={value}: .*use|above") as error:
        policy(**{field: value})
    assert "\n" not in str(error.value)


def test_fewer_experts_than_ranks() -> None:
    grid = Grid(edp=4, ep=8)
    with pytest.raises(
        UserError, match=r"the 24 experts of a stage's 3 MoE layers .* edp\*ep=32 ranks.*placement=static"
    ):
        check(grid, [8, 8, 8], FSSDP())
    check(grid, [8, 8, 8], Static())
    check(grid, [8, 8, 8, 8], ReplicateAll())
    check(grid, [], FSSDP())


def test_room_is_what_memory_holds() -> None:
    GiB = 2**30
    assert room(FSSDP(memory=4.0), GiB // 2, layers=2) == 8
    assert room(FSSDP(), GiB, layers=2) is None
    assert room(Static(), GiB, layers=2) is None
    with pytest.raises(UserError, match=r"model\.moe\.placement\.memory=1\.5: one replica .* 2 MoE layers takes 2 GiB"):
        room(Shadow(memory=1.5), 2 * GiB, layers=2)


@pytest.mark.parametrize(
    ("owners", "says"),
    [
        ([[0, 1], [1]], r"layer 1 misses experts \[1\] of 2"),
        ([[0, 1], [-1, 1]], r"layer 1 misses experts \[0\] of 2"),
        ([[0, 1, 1], [0, 1]], r"layer 0 names 3 experts of 2"),
        ([[0, 1], [0, 2]], r"layer 1 puts expert 1 on rank 2, the stage has 2 \(0 to 1\)"),
        ([[0, 0], [0, 1]], r"gives rank 0 3 experts and rank 1 1"),
        ([[0, 1]], r"has 1 MoE layers where the stage has 2"),
    ],
)
def test_owner_maps_that_cannot_be(owners: list[list[int]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_owners([torch.tensor(row) for row in owners], [2, 2], 2)
    check_owners([torch.tensor([0, 1]), torch.tensor([1, 0])], [2, 2], 2)


def test_overload_of_no_load_is_one() -> None:
    assert Modelled(0.0, 0.0, 0.0, 0, 0, 0.0, 0.0, 0.0).overload == 1


@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_a_rank_knows_its_peers_without_the_others(case) -> None:
    load_E, owner_E, grid, costs = case
    placement = FSSDP()(load_E, owner_E, grid, costs)
    assert torch.equal(torch.stack([placement.peers_of(r) for r in range(grid.ranks)]), placement.peer_RE)
