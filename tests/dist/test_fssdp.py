"""Experts that travel are the same run: random placements and owners, through reshards, checkpoints and every level."""

import numpy as np
import pytest
import torch
import whole
from drawn import drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_health_ranks import readings
from test_train import STEPS, TRAIN, close, config, curve, error, trainer
from torch import Tensor, nn

from moetrain import comm
from moetrain.config import config as config_node
from moetrain.config import UserError, replace
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.travelling import check_owners, place
from moetrain.moe.placement.types import Costs, Grid, Placement
from moetrain.moe.travel import Replicas, Trip
from moetrain.resume import Start


def scattered(seed: int, owner_E: Tensor, grid: Grid, *, part: float) -> Placement:
    """Each rank has a replica of an expert with probability ``part``."""
    away = np.random.default_rng(seed).random((grid.ranks, len(owner_E))) < part
    holds = away | (owner_E.numpy() == np.arange(grid.ranks)[:, None])
    return place(holds, owner_E.numpy(), grid, span=grid.ranks)


@config_node
class Scattered(FSSDP):
    """Random owners and replicas that follow from the load: others at every step, other owners every second one."""

    window: int = 2
    reshard_every: int = 2

    def owners(self, loads: list[Tensor], grid: Grid) -> list[Tensor]:
        count = sum(len(load_E) for load_E in loads)
        even = np.arange(count) % grid.ranks
        owners = np.random.default_rng(_seed(torch.cat(loads))).permutation(even)
        found = list(torch.from_numpy(owners).split([len(load_E) for load_E in loads]))
        check_owners(found, [len(load_E) for load_E in loads], grid.ranks)
        return found

    def __call__(self, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> Placement:
        return scattered(_seed(load_E) + int(owner_E.sum()), owner_E, grid, part=0.4)


def _seed(load: Tensor) -> int:
    return int((load * (torch.arange(len(load)) + 3)).sum() * 2) % 2**31


def with_placement(cfg, policy):
    pinned = policy.costs
    if not any(pinned.values.values()):
        policy = replace(policy, costs=replace(pinned, row=1.0, hop=0.0, expert=0.0, hidden=0.0))
    return replace(cfg, model=replace(cfg.model, moe=replace(cfg.model.moe, placement=policy)))


KINDS = {
    "level 3, accumulated here": {},
    "level 2, accumulated here": {"sharding": {"experts": 2}},
    "level 3, reduced each time": {"sharding": {"accumulate": "sharded"}},
    "level 2, reduced each time": {"sharding": {"accumulate": "sharded", "experts": 2}},
    "recomputed": {"recompute": {"mode": "full"}},
    "recomputed in parts": {"recompute": {"mode": "selective", "parts": ["norm", "moe"]}},
    "calibrated": {"sharding": {"experts": 2}},
    "calibrated, recomputed": {"recompute": {"mode": "full"}},
    "calibrated, reduced each time": {"sharding": {"accumulate": "sharded"}},
    "Muon": {"optim": {"kind": "muon", "lr": 1e-2}},
    "frozen experts": {"optim": {"freeze": ["*.experts.*"]}},
    "capacity": {"model": {"dispatcher": {"kind": "capacity", "factor": 1.0}}},
    "all-gather": {"model": {"dispatcher": {"kind": "allgather"}}},
    "hierarchical": {"model": {"dispatcher": {"kind": "hierarchical", "ranks_per_node": 2}}},
}
LAYOUTS = {
    2: [{"dp": 2, "ep": 2}, {"dp": 2}, {"dp": 1, "tp": 2, "etp": 2}],
    4: [
        {"dp": 4, "ep": 2}, {"dp": 1, "cp": 2, "tp": 2, "ep": 2, "etp": 2}, {"pp": 2, "dp": 2, "ep": 2},
        {"dp": 2, "cp": 2},
    ],
}  # fmt: skip
SCHEDULES = ["1f1b", "interleaved", "zbv", "dualpipev"]


def small(corpus, folder, kind: str, layout: dict, **groups):
    from test_train import MODEL

    sets = {name: dict(keys) for name, keys in KINDS[kind].items()}
    moe = MODEL["moe"] | sets.pop("model", {})
    model = MODEL | {"moe": moe, "num_layers": 4}
    return config(corpus, folder, model=model, layout=layout, **sets | groups)


TRIALS = drawn(
    [(world, layout, kind) for world in LAYOUTS for layout in LAYOUTS[world] for kind in KINDS], 6, of="travels"
)


@pytest.mark.parametrize(("world", "layout", "kind"), TRIALS, ids=str)
def test_random_placements_and_owners_are_the_run_of_one_rank(
    ranks, small_corpus, tmp_path, world, layout, kind
) -> None:
    train = TRAIN | {"micro_batch": 1} if "pp" in layout else TRAIN  # so that there are enough for each schedule
    want = curve(0, 1, small(small_corpus, tmp_path / "one", kind, {}, train=train))
    schedule = SCHEDULES[sum(map(ord, kind)) % len(SCHEDULES)]
    cfg = small(small_corpus, tmp_path / "run", kind, layout, train=train, pipeline={"schedule": schedule, "chunks": 2}
    )
    cfg = with_placement(cfg, Scattered(calibrate=kind.startswith("calibrated")))
    got = ranks(world).run(curve, cfg)
    assert all(g == got[0] for g in got), "ranks agree"
    close(got[0], want)
    saved = whole.tensors(whole.newest(tmp_path / "one"))
    for name, tensor in whole.tensors(whole.newest(cfg.run.folder)).items():
        if name in saved:
            assert error(tensor, saved[name]) < 1e-9, f"{name} after {STEPS} steps"


def test_calibration_is_counted(ranks, small_corpus, tmp_path) -> None:
    cfg = small(small_corpus, tmp_path / "run", "calibrated", {"dp": 2, "ep": 2})
    syncs, accepted, seconds = ranks(2).run(calibrations, with_placement(cfg, Scattered(calibrate=True)))[0]
    assert syncs == STEPS * 3 * 2, "a step has three MoE layers and two micro-batches"
    assert 0 < accepted < syncs
    assert seconds > 0


def calibrations(rank: int, world: int, cfg) -> tuple[int, int, float]:
    run = trainer(rank, world, cfg)
    for _ in range(STEPS):
        run.step()
    assert run.mover is not None
    done = run.mover.calibrations
    return done.syncs, done.accepted, done.seconds


def moves(rank: int, world: int, cfg, steps: int) -> list[tuple[int, int]]:
    """Experts that travelled to this rank, and changed owners, after each step."""
    run, found = trainer(rank, world, cfg), []
    for _ in range(steps):
        run.step()
        assert run.mover is not None
        assert run.mover.now is not None
        found.append((sum(sum(trip.recv) for trip in run.mover.now.trips), run.mover.moved))
    return found


def test_these_placements_do_travel(ranks, small_corpus, tmp_path) -> None:
    cfg = with_placement(small(small_corpus, tmp_path / "run", "Muon", {"dp": 4, "ep": 2}), Scattered())
    found = ranks(4).run(moves, cfg, 3)
    assert all(min(travelled for travelled, _ in of_rank) > 0 for of_rank in found)
    assert [moved for _, moved in found[0]][:2] == [0, 0]
    assert found[0][2][1] > 0


ROUND_TRIPS = [(4, {"dp": 4, "ep": 2}, 2, {"dp": 2, "ep": 2}), (2, {"dp": 2}, 4, {"dp": 1, "tp": 2, "cp": 2, "ep": 4})]


@pytest.mark.parametrize(("world", "layout", "other", "there"), ROUND_TRIPS, ids=str)
def test_a_checkpoint_goes_to_static_and_back_bit_for_bit(
    ranks, small_corpus, tmp_path, world, layout, other, there
) -> None:
    cfg = with_placement(small(small_corpus, tmp_path / "run", "recomputed", layout), Scattered())
    ranks(world).run(curve, cfg, 3)
    first = whole.newest(cfg.run.folder)
    static = small(small_corpus, tmp_path / "static", "recomputed", there)
    ranks(other).run(saved_again, static, first)
    second = whole.newest(static.run.folder)
    back = with_placement(small(small_corpus, tmp_path / "back", "recomputed", layout), Scattered())
    ranks(world).run(saved_again, back, second)
    a, b, c = (whole.tensors(folder) for folder in (first, second, whole.newest(back.run.folder)))
    assert {name for name in a if not name.startswith("placement.")} == b.keys()
    for name in b:
        assert torch.equal(a[name], b[name]), name
        assert torch.equal(a[name], c[name]), name


def saved_again(rank: int, world: int, cfg, folder) -> None:
    run = trainer(rank, world, cfg)
    run.load(Start(folder))
    run.save()


@pytest.mark.parametrize("layout", [{"dp": 2, "ep": 2}, {"dp": 2}], ids=str)
def test_resume_repeats_the_placements_and_the_bits(ranks, small_corpus, tmp_path, layout) -> None:
    float32 = TRAIN | {"dtype": "float32", "steps": 6}
    unbroken, parts = (
        with_placement(small(small_corpus, tmp_path / n, "recomputed", layout, train=float32), Scattered())
        for n in ("unbroken", "parts")
    )
    pool = ranks(2)
    want = pool.run(curve, unbroken, 6)[0]
    first = pool.run(curve, parts, 3)[0]
    second = pool.run(curve, parts, 3, whole.newest(parts.run.folder))[0]
    assert [*first[:2], first[2][:-1], *second] == want, "but for the held-out loss at 3"
    a, b = (whole.tensors(whole.newest(cfg.run.folder)) for cfg in (unbroken, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@st.composite
def trips(draw):
    ranks = draw(st.sampled_from([2, 4]))
    experts = draw(st.integers(1, 9))
    owner = draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts))
    seed = draw(st.integers(0, 2**16))
    return ranks, owner, seed, draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.booleans()), draw(st.booleans())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=trips())
def test_gather_and_reduce_scatter_of_any_placement(ranks, case) -> None:
    assert all(ranks(case[0]).run(there_and_back, *case[1:]))


@config_node
class Lossy(Scattered):
    def owners(self, loads: list[Tensor], grid: Grid) -> list[Tensor]:
        return [owner_E[:-1] for owner_E in super().owners(loads, grid)]


def test_an_owner_map_that_misses_an_expert_is_refused_before_the_first_step(small_corpus, tmp_path) -> None:
    cfg = with_placement(small(small_corpus, tmp_path / "run", "recomputed", {}), Lossy())
    with pytest.raises(UserError, match=r"the owner map of the stage's MoE layer 0 misses experts \[7\] of 8"):
        trainer(0, 1, cfg)


def there_and_back(rank: int, world: int, owner: list[int], seed: int, part: float, keep: bool, low: bool) -> bool:
    """The weights of every slot are its expert's; what replicas leave at them arrives at the owner, in whole sums."""
    mesh = Mesh.build(Layout(dp=world, ep=world), rank=rank, world=world, device=torch.device("cpu"))
    owner_E, grid = torch.tensor(owner), Grid(1, world)
    placement = scattered(seed, owner_E, grid, part=part)
    trip = Trip.of(placement, rank)
    mine = (owner_E == rank).nonzero().flatten()
    full = [torch.randn(len(owner), *shape, generator=torch.Generator().manual_seed(5)) for shape in ((2, 3, 4), (4, 3))]
    owned = tuple(nn.Parameter(w[mine]) for w in full)
    dtype = torch.bfloat16 if low else torch.float32
    group = mesh.group("moe", "edp", "ep", use="experts")
    replicas = Replicas(owned, trip, group=group, dtype=dtype, keep=keep)
    ids = placement.slots_of(rank)
    for micro_batch in range(2):
        replicas.last = replicas.reduces = micro_batch == 1
        replicas.start()
        slots = replicas.ready()
        for got, w in zip(slots, full, strict=True):
            assert torch.equal(got[: len(ids)], w[ids].to(dtype))
        y = sum(((w * (micro_batch + 1) * 2.0 ** (rank % 2)).sum() for w in slots), torch.zeros(()))
        replicas.used(y)
        assert replicas.here == keep
        y.backward()
        assert replicas.here == (keep and micro_batch == 0)
    replicas.finish()
    scale_R = 3.0 * 2.0 ** (torch.arange(world) % 2)
    want_E = (placement.holds_RE * scale_R[:, None]).sum(0)[mine]
    return all(torch.equal(p.grad, want_E.view(-1, *[1] * (p.dim() - 1)).expand_as(p)) for p in owned)  # pyright: ignore


def test_nothing_is_sent_where_nobody_has_a_replica(ranks, small_corpus, tmp_path) -> None:
    """Equal costs of zero and no load known: owners alone; the same collectives as static expert parallelism."""
    counted = []
    for placed in (False, True):
        cfg = small(small_corpus, tmp_path / str(placed), "recomputed", {"dp": 2, "ep": 2})
        counted.append(ranks(2).run(sent, with_placement(cfg, FSSDP()) if placed else cfg)[0])
    assert counted[0] == counted[1]
    assert sum(counted[0]) > 0


def sent(rank: int, world: int, cfg) -> list[int]:
    """Numbers that every all-to-all of a step takes."""
    run, found, exchange, start = trainer(rank, world, cfg), [], comm._exchange, comm.start_all_to_all
    try:
        comm._exchange = lambda x, *rest: (found.append(x.numel()), exchange(x, *rest))[1]
        comm.start_all_to_all = lambda into, x, **rest: (found.append(x.numel()), start(into, x, **rest))[1]
        run.step()
    finally:
        comm._exchange, comm.start_all_to_all = exchange, start
    return found


def test_health_counts_replicas_bytes_and_rows(ranks, small_corpus, tmp_path) -> None:
    """Micro-batches 2, level 3: weights go out for every forward and backward, gradients come back once."""
    cfg = small(small_corpus, tmp_path / "run", "level 3, accumulated here", {"dp": 2, "ep": 2})
    cfg = with_placement(replace(cfg, health=replace(cfg.health, enabled=True)), Scattered())
    got, of_rank = ranks(2).run(readings, cfg), ranks(2).run(placements, cfg)
    number, there = 3 * cfg.model.dim * cfg.model.moe.hidden, 0
    for step in range(STEPS):
        reading = got[0][step][0]
        for i, (layer, values) in enumerate(reading.layers.items()):
            holds_RE, owner_E = (torch.tensor(x) for x in of_rank[0][step][i])
            copies_E = holds_RE.sum(0) - 1
            assert reading.copies[i] == copies_E.tolist()
            assert values["replicas"] == copies_E.sum()
            there += int(copies_E.sum())
            assert values["moved"] == pytest.approx(int(copies_E.sum()) * number * 8 * (2 * 2 + 1) / 1e6)
            rows = [rank[step][1][layer] for rank in got]
            assert values["overload"] == pytest.approx(max(rows) * 2 / sum(rows))
            home_R = torch.zeros(2).scatter_add_(0, owner_E, torch.tensor(reading.load[i]))
            assert values["home_overload"] == pytest.approx((home_R.max() / home_R.mean()).item(), rel=1e-5)
    assert there > 0


def placements(rank: int, world: int, cfg) -> list[list[tuple[list, list]]]:
    """(holds_RE, owner_E) of each layer after each step."""
    run, found = trainer(rank, world, cfg), []
    for _ in range(STEPS):
        run.step()
        at = [layer.placement for layer in run.model.moe_layers()]
        found.append([(p.holds_RE.tolist(), p.owner_E.tolist()) for p in at])
    return found
