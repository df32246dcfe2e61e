"""What a dry run foretells is what the same run on real tensors is seen to hold."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from drawn import drawn
from test_train import MODEL, TRAIN, config, trainer

from moetrain.job import Config
from moetrain.memory import dry
from moetrain.memory.dry import Estimate, estimate, hold
from moetrain.memory.ledger import Ledger, Usage
from moetrain.moe.routers import topk
from moetrain.parallel import pipeline

BIG = MODEL | {
    "dim": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "dense_hidden": 256, "vocab_size": 1024,
    "moe": MODEL["moe"] | {"num_experts": 8, "hidden": 128, "shared_hidden": 64},
}  # fmt: skip
LONG = TRAIN | {"micro_batch": 2, "seq_len": 128, "dtype": "float32"}
DEEP = BIG | {"num_layers": 4}
EVERYWHERE = DEEP | {"moe": DEEP["moe"] | {"placement": {"kind": "replicate_all"}}}
CASES = {
    "dp": (2, {"dp": 2, "ep": 2}, {"sharding": {"accumulate": "sharded"}}),
    "all but pp": (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}, {}),
    "1f1b": (2, {"pp": 2}, {}),
    "interleaved": (4, {"pp": 2, "dp": 2, "ep": 2}, {"pipeline": {"schedule": "interleaved"}, "model": DEEP}),
    "zbv of 4 ranks": (
        4, {"pp": 2, "dp": 2},
        {"pipeline": {"schedule": "zbv"}, "model": DEEP, "sharding": {"accumulate": "sharded"}},
    ),
    "recompute full": (2, {"dp": 2}, {"recompute": {"mode": "full"}}),
    "recompute selective": (2, {"tp": 2, "ep": 2}, {"recompute": {"mode": "selective", "loss_rows": 64}}),
    "windows": (2, {"cp": 2}, {"model": BIG | {"windows": [40, 0]}, "recompute": {"mode": "selective"}}),
    "muon": (2, {"dp": 2}, {"optim": {"kind": "muon"}}),
    "zero-computation experts": (
        2, {"dp": 2, "ep": 2},
        {"model": BIG | {"moe": BIG["moe"] | {"zero_computation": dict.fromkeys(("zero", "copy", "constant", "nulls"), 2)}}},
    ),
    "every expert everywhere": (2, {"dp": 2, "ep": 2}, {"model": EVERYWHERE}),
    "every expert everywhere, level 2": (4, {"dp": 4}, {"model": EVERYWHERE, "sharding": {"experts": 2}}),
    "every expert everywhere, zbv": (
        4, {"pp": 2, "dp": 2, "ep": 2},
        {"pipeline": {"schedule": "zbv"}, "model": EVERYWHERE, "sharding": {"accumulate": "sharded"}},
    ),
}  # fmt: skip

def measure(rank: int, world: int, cfg: Config, foretold: list[int]) -> Usage:
    """The peak of a real step whose experts all get the same load: the least of some, until none is above what was
    foretold. gloo's threads let go of what they have sent when they come to it, at times after the next buffer is made.
    """

    def even(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
        T, E = scores_TE.shape
        return (torch.arange(T)[:, None] * k + torch.arange(k)) % E

    chosen, topk.top_k = topk.top_k, even
    try:
        run, found = trainer(rank, world, cfg), []
        for _ in range(10):
            ledger = Ledger()
            hold(ledger, run)
            with ledger:
                run.step()
            found.append(ledger.peak())
            least = min(found, key=lambda usage: usage.total)
            above = torch.tensor(least.total > 1.001 * foretold[rank * len(foretold) // world])
            dist.all_reduce(above, dist.ReduceOp.MAX)
            if not above:
                break
        return least
    finally:
        topk.top_k = chosen


def apart(fn, *args, **kwargs):
    """In a process of its own: what torch remembers of a fake world is not for the ranks that are forked from this."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(fn, args, kwargs)


@pytest.mark.parametrize("case", drawn(CASES, 3, of="dry runs"))
def test_as_measured(ranks, small_corpus, tmp_path: Path, case) -> None:
    world, layout, groups = CASES[case]
    train = LONG | {"batch": (2 if layout.get("pp", 1) == 1 else 8) * 2 * layout.get("dp", 1)}
    cfg = config(small_corpus, tmp_path, **({"model": BIG} | groups), train=train, layout=layout)
    pp = layout.get("pp", 1)
    every = [apart(estimate, cfg, world=world, at=at) for at in range(pp)]
    measured = ranks(world).run(measure, cfg, [foretold.peak.total for foretold in every])
    for at, foretold in enumerate(every):
        seen = max(measured[at * world // pp : (at + 1) * world // pp], key=lambda u: u.total)
        off = {kind.value: (foretold.peak.by_kind[kind] - n) / seen.total for kind, n in seen.by_kind.items()}
        words = f"{case}, rank {at} of pp: {foretold.peak.total / seen.total - 1:+.4%} of {seen.total}"
        print(
            words, {k: f"{x:+.3%}" for k, x in off.items() if x}, foretold.micro_batches, foretold.peak.when, seen.when
        )
        assert foretold.peak.total == pytest.approx(seen.total, rel=0.001), words
        assert max(map(abs, off.values())) < 0.001, (words, off)


SHARDED = {"accumulate": "sharded"}
TRAVEL = BIG["moe"] | {"placement": {"kind": "fssdp", "memory": 0.002}}
REPEATED = {
    "1f1b, recompute": ("1f1b", 1, True, {"recompute": {"mode": "full"}}),
    "interleaved": ("interleaved", 0, True, {"sharding": SHARDED | {"experts": 2}}),
    "interleaved zero bubble, tied": ("interleaved_zero_bubble", 3, True, {"model": {"tie_embeddings": True}}),
    "zbv": ("zbv", 0, True, {"sharding": SHARDED}),
    "zbv on CPUs": ("zbv", 1, False, {"sharding": SHARDED}),
    "zbv, Muon": ("zbv", 3, True, {"optim": {"kind": "muon"}}),
    "zbv, experts that travel": ("zbv", 0, True, {"model": {"moe": TRAVEL}, "sharding": SHARDED | {"experts": 2}}),
    "1f1b, experts that travel": ("1f1b", 1, True, {"model": {"moe": TRAVEL}, "train": {"dtype": "bfloat16"}}),
    "dualpipev": ("dualpipev", 0, True, {}),
    "dualpipev, sharded gradients": ("dualpipev", 0, True, {"sharding": SHARDED}),
    "dualpipev on CPUs": (
        "dualpipev", 1, False, {"sharding": {"dense": 2, "experts": 2}, "recompute": {"mode": "selective"}},
    ),
}  # fmt: skip


def without_repeats(cfg: Config, **known) -> Estimate:
    dry.repeating = lambda *_: pipeline.Run
    return estimate(cfg, **known)


@pytest.mark.parametrize("case", drawn(REPEATED, 1, of="repeats"))
def test_micro_batches_that_are_not_run_again_change_nothing(small_corpus, tmp_path, case) -> None:
    schedule, at, gpu, groups = REPEATED[case]
    groups = groups | {"model": BIG | {"num_layers": 8} | groups.get("model", {})}
    cfg = config(
        small_corpus, tmp_path, train=LONG | {"batch": 64} | groups.pop("train", {}), layout={"pp": 4, "dp": 2, "ep": 2},
        pipeline={"schedule": schedule}, **groups,
    )  # fmt: skip
    few, all_of_them = (apart(fn, cfg, world=8, at=at, gpu=gpu) for fn in (estimate, without_repeats))
    assert few.peak == all_of_them.peak
    assert few.between_steps.total == pytest.approx(all_of_them.between_steps.total, abs=256), "a loss each"
