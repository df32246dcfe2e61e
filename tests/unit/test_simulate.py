"""The simulator: times by hand, laws that hold for any load, traces that come back as they were."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.config import OPTIONS, UserError
from moetrain.moe.layer import MoEConfig
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.static import Static
from moetrain.moe.placement.types import Grid, Placement
from moetrain.simulate.cluster import Cluster
from moetrain.simulate.loads import TRACES, Drift, Zipf, counted, recorded
from moetrain.simulate.price import Layer, Price, Travel, price
from moetrain.simulate.runs import KNOWN, Outcome, Sample, priced, run
from moetrain.telemetry.load_trace import LoadTrace, read

PAIR = Cluster(
    nodes=1, ranks_per_node=2, intra=2.0, inter=1.0, latency=10.0, peak=1.0, gemm=0.5, attention=0.25, memory=1.0
)
"""2 ranks: 2,000 bytes a us between them, 500,000 flops a us for experts, 250,000 for the rest."""
SMALL = Layer(dim=100, top_k=2, expert_params=10_000, other_flops=25_000.0, tokens=1_000, gradient_bytes=4)


def of(placement: Placement, load: list[int], *, cluster: Cluster = PAIR, layer: Layer = SMALL, **words: bool) -> Price:
    words = {"travels": False} | words
    return price(placement, torch.tensor(load).double(), layer=layer, cluster=cluster, **words)


def static(experts: int, ranks: int, *, edp: int = 1) -> Placement:
    load_E = torch.ones(experts)
    grid = Grid(edp, ranks // edp)
    policy = Static()
    costs = SMALL.costs(PAIR, 1)
    return policy(load_E, policy.owners([load_E], grid)[0], grid, costs)


def test_two_ranks_two_experts_by_hand() -> None:
    """3,000 of 4,000 assignments go to expert 0: half of them come from rank 1."""
    found = of(static(2, 2), [3, 1])
    assert found.attention == pytest.approx(3 * 25_000 * 1_000 / 250_000 / 1e3)
    assert found.compute == pytest.approx(3_000 * 3 * 2 * 10_000 / 500_000 / 1e3)
    # 1,500 rows leave rank 1 and 500 rank 0, 200 bytes each, four times: the fuller link is busy for 150 us
    assert found.tokens == pytest.approx(4 * (10 + 1_500 * 200 / 2_000) / 1e3)
    assert (found.experts, found.replicas, found.expert_bytes) == (0.0, 0.0, 0.0)
    assert found.token_bytes == pytest.approx(4 * (1_500 + 500) / 2 * 200)
    assert found.overload == pytest.approx(1.5)


@pytest.mark.parametrize("again", [False, True])
def test_a_replica_travels_under_attention(again: bool) -> None:
    """Expert 0 on both ranks: rank 0 computes 1,500 + all 1,000 of expert 1's go to rank 1."""
    layer = Layer(**{**vars(SMALL), "again": again, "other_flops": 25.0})
    plan = Placement(torch.tensor([[0, -1], [1, 0]]), torch.tensor([0, 1]), span=2)
    found = of(plan, [3, 1], layer=layer, travels=True)
    assert found.compute == pytest.approx(2_500 * 3 * 2 * 10_000 / 500_000 / 1e3)
    assert found.tokens == pytest.approx(4 * (10 + 500 * 200 / 2_000) / 1e3)
    hidden = 3 * 25 * 1_000 / 250_000  # us: a third of it in forward
    weights, gradients = 10 + 20_000 / 2_000, 10 + 40_000 / 2_000
    exposed = weights - hidden / 3 + again * weights + gradients - hidden * 2 / 3
    assert found.experts == pytest.approx(exposed / 1e3)
    assert found.expert_bytes == pytest.approx((20_000 * (1 + again) + 40_000) / 2)
    assert of(plan, [3, 1], travels=True).experts == 0  # 100 us of attention and more hide it


def test_static_gathers_over_edp_what_fsdp_shards() -> None:
    """2 experts on 4 ranks of 2 nodes, ep 2, edp 2: half a block of one expert comes to each from the other node."""
    cluster = Cluster(**{**vars_of(PAIR), "nodes": 2, "ranks_per_nic": 2})
    layer = Layer(**{**vars(SMALL), "other_flops": 1.0})
    found = of(static(2, 4, edp=2), [1, 1], cluster=cluster, layer=layer)
    attention = 3 * 1 * 1_000 / 250_000
    gather, reduce = 10 + 10_000 / 1_000, 10 + 20_000 / 1_000
    assert found.experts == pytest.approx((2 * gather + reduce - attention) / 1e3)
    assert found.replicas == 0.5
    assert found.token_bytes > 0  # in their ep row alone: none of it leaves a node
    once = of(static(2, 4, edp=2), [1, 1], cluster=cluster, layer=layer, regather=False)
    assert once.experts == pytest.approx(found.experts - gather / 1e3)


def test_a_card_is_shared_and_nodes_relay() -> None:
    """4 ranks of 2 nodes, 1,000 bytes a us each between nodes, two on a card: one alone may use all of it."""
    cluster = Cluster(**{**vars_of(PAIR), "nodes": 2, "ranks_per_nic": 2})
    one, two = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    one[0, 2] = two[0, 2] = two[1, 3] = 8_000.0
    assert cluster.exchange(one) == pytest.approx(10 + 8_000 / 2_000)
    assert cluster.exchange(two) == pytest.approx(10 + 16_000 / 2_000)
    alone = Cluster(**{**vars_of(PAIR), "nodes": 2})
    assert alone.exchange(one) == alone.exchange(two) == pytest.approx(10 + 8_000 / 1_000)
    assert cluster.exchange(torch.eye(4).double()) == 0  # what stays is not sent
    moved_RE = torch.tensor([[False], [True], [True], [True]])
    assert cluster.relay(moved_RE, torch.tensor([0]), 8_000.0) == pytest.approx(8_000 / 2_000)
    everywhere = torch.zeros(4, 4).double()
    everywhere[0, 1:] = 8_000.0
    assert cluster.links(everywhere) == pytest.approx(2 * 8_000 / 2_000)  # each copy by itself crosses twice


def vars_of(cluster: Cluster) -> dict:
    return {k: v for k, v in vars(cluster).items() if not k.startswith("_")}


def simulated(
    name: str, loads: list[Tensor], *, ranks: int, layer: Layer = SMALL, sample: Sample | None = None
) -> Outcome:
    cluster = Cluster(nodes=2, ranks_per_node=ranks // 2, intra=100.0, inter=10.0)
    policies = {name: OPTIONS["placement"][name]() for name in ("static", "fssdp", name)}
    steps, layers = priced(policies.values(), loads, sample or Sample(steps=3, layers=2))
    return run(name, policies[name], loads, layer=layer, cluster=cluster, ranks=ranks, steps=steps, layers=layers)


def made(exponent: float, *, experts: int = 16, kind: type[Zipf] = Zipf) -> list[Tensor]:
    return [
        kind(exponent=exponent, steps=120).load(experts=experts, top_k=2, tokens=8_000, layer=i, seed=0)
        for i in range(2)
    ]


def test_an_even_load_needs_no_fssdp() -> None:
    """Where experts are dear to move; small ones travel to save their tokens the way."""
    large = Layer(**{**vars(SMALL), "expert_params": 1_000_000})
    even = [simulated(name, made(0.0), ranks=8, layer=large) for name in ("static", "fssdp")]
    assert even[1].layer == pytest.approx(even[0].layer, rel=0.01)
    assert even[0].overload == pytest.approx(1.0)
    skewed = [simulated(name, made(1.0), ranks=8, layer=large) for name in ("static", "fssdp")]
    assert skewed[1].layer < 0.9 * skewed[0].layer


def test_the_more_skewed_the_slower_static_and_the_better_fssdp() -> None:
    layer = Layer(**{**vars(SMALL), "expert_params": 30_000})
    both = ("static", "fssdp")
    found = [[simulated(name, made(x), ranks=8, layer=layer) for name in both] for x in (0.0, 0.5, 1.0, 1.5)]
    statics, ratios = [s.layer for s, _ in found], [s.layer / f.layer for s, f in found]
    assert statics == sorted(statics)
    assert ratios == sorted(ratios)
    assert ratios[0] == pytest.approx(1.0, rel=0.01)
    assert statics[-1] > 2 * statics[0]
    assert ratios[-1] > 1.5


def test_every_policy_computes_every_row_and_replicate_all_moves_no_token() -> None:
    loads = made(1.0)
    found = {name: simulated(name, loads, ranks=8) for name in OPTIONS["placement"]}
    least = SMALL.rows * SMALL.row_us(Cluster()) / 1e3
    assert all(x.compute == pytest.approx(least * x.overload) for x in found.values())
    everywhere = found["replicate_all"]
    assert (everywhere.tokens, everywhere.overload, everywhere.replicas) == (0.0, pytest.approx(1.0), 14.0)
    assert found["fssdp"].reshard > 0 == found["shadow"].reshard


def test_a_plan_is_a_step_late() -> None:
    """The hot expert changes at step 100: the first plan that may know it is that of step 102."""
    hot, cold = torch.tensor([90.0, 10.0]), torch.tensor([10.0, 90.0])
    loads = [torch.stack([hot] * 100 + [cold] * 20)]
    layer = Layer(**{**vars(SMALL), "travel": Travel.direct})
    seen = []

    class Spy(FSSDP):
        def __call__(self, load_E, owner_E, grid, costs):
            seen.append(float(load_E[0] / load_E.sum()))
            return super().__call__(load_E, owner_E, grid, costs)

    cluster = Cluster(nodes=1, ranks_per_node=2)
    steps = [100, 100 + KNOWN - 1, 100 + KNOWN, 100 + KNOWN + 4]
    run("spy", Spy(), loads, layer=layer, cluster=cluster, ranks=2, steps=steps, layers=[0])
    assert seen == pytest.approx([0.9, 0.9, (4 * 0.9 + 0.1) / 5, 0.1])


@pytest.mark.parametrize("kind", TRACES)
@pytest.mark.parametrize("exponent", [0.0, 0.7, 3.0])
def test_made_loads_follow_from_the_seed_and_sum_up(kind: str, exponent: float) -> None:
    trace = TRACES[kind](exponent=exponent, steps=50)
    load, again, other = (trace.load(experts=12, top_k=3, tokens=1_001, layer=1, seed=s) for s in (4, 4, 5))
    assert torch.equal(load, again)
    assert load.shape == (50, 12)
    assert (load.sum(1) == 3 * 1_001).all()
    assert ((load >= 0) & (load <= 1_001)).all()  # a token's experts are distinct
    if exponent:
        assert not torch.equal(load, other)
        assert not torch.equal(load, trace.load(experts=12, top_k=3, tokens=1_001, layer=2, seed=4))


def test_zipf_stays_and_drift_wanders() -> None:
    stays = Zipf(steps=50).load(experts=16, top_k=1, tokens=10_000, layer=0, seed=0)
    wanders = Drift(steps=50, every=20, share=0.25).load(experts=16, top_k=1, tokens=10_000, layer=0, seed=0)
    assert (stays == stays[0]).all()
    assert (wanders[:20] == stays[:20]).all()
    for step in (20, 40):
        assert int((wanders[step] != wanders[step - 1]).sum()) == 4  # a quarter of 16
        assert torch.equal(wanders[step].sort().values, stays[0].sort().values)


def test_counted_is_nearest() -> None:
    assert counted(torch.tensor([1.0, 1.0, 1.0]).double(), tokens=10, top_k=1).tolist() == [4, 3, 3]
    assert counted(torch.tensor([98.0, 1.0, 1.0]).double(), tokens=10, top_k=2).tolist() == [10, 5, 5]


def trace(folder: Path, *, steps: int, resume_at: int = 0) -> LoadTrace:
    moes = {1: MoEConfig(num_experts=4), 3: MoEConfig(num_experts=4)}
    written = LoadTrace(folder, moes, tokens=50, resume_at=resume_at)
    for step in range(resume_at + 1, resume_at + steps + 1):
        written.write([step], [torch.full((2, 4), step)])
    return written


def test_a_trace_comes_back_and_a_resumed_run_continues_it(tmp_path) -> None:
    trace(tmp_path, steps=5).close()
    trace(tmp_path, steps=2, resume_at=3).close()  # steps 4 and 5 are done again, and written once
    with (tmp_path / "loads.jsonl").open("a") as file:
        file.write('{"step": 6, "loa')  # a run that is writing, or was killed
    found = read(tmp_path)
    assert (found.layers, found.top_k, found.tokens, found.steps) == ([1, 3], [2, 2], 50, [1, 2, 3, 4, 5])
    assert [x[:, 2].tolist() for x in found.loads] == [[1, 2, 3, 4, 5]] * 2
    assert recorded(tmp_path / "loads.jsonl", experts=[4, 4], top_k=[2, 2]).steps == found.steps
    with pytest.raises(UserError, match="2 MoE layers of 4 experts, the model 2 MoE layers of 8"):
        recorded(tmp_path, experts=[8, 8], top_k=[2, 2])


HEADER = {
    "format": "moetrain-loads", "version": 1, "layers": [0], "experts": [2], "top_k": [1], "tokens": 3,
}  # fmt: skip
ROW = {"step": 1, "load": [[1, 2]]}
DAMAGED = {
    "no header": ([ROW], "no format 'moetrain-loads' in its first line"),
    "not JSON": (["loads"], "no format"),
    "a newer version": ([HEADER | {"version": 2}], "has version 2, this moetrain reads 1"),
    "a header of two minds": ([HEADER | {"top_k": [1, 1]}, ROW], "line 1: the header is damaged"),
    "a header without experts": ([HEADER | {"experts": "two"}, ROW], "line 1: the header is damaged"),
    "no step": ([HEADER], "a header and no step yet"),
    "half a line": ([HEADER, ROW, '{"step": 2, "load"'], "line 3: damaged"),
    "an expert too few": ([HEADER, ROW, {"step": 2, "load": [[1]]}], r"line 3: damaged, .* the loads of \[2\] experts"),
    "a load below none": ([HEADER, {"step": 1, "load": [[1, -2]]}], "line 2: damaged"),
    "a load that is no count": ([HEADER, {"step": 1, "load": [[1, 2.5]]}], "line 2: damaged"),
    "a step twice": ([HEADER, ROW, ROW], "line 3: step 1 after step 1"),
}


@pytest.mark.parametrize(("lines", "says"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_trace_is_one_line(tmp_path, lines: list, says: str) -> None:
    path = tmp_path / "loads.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    with pytest.raises(UserError, match=says) as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_is_no_text_is_one_line(tmp_path) -> None:
    (tmp_path / "loads.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
