"""What a dry run foretells is what the same run on real tensors is seen to hold."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from drawn import drawn
from test_train import MODEL, TRAIN, config, trainer

from moetrain.job import Config
from moetrain.memory.dry import estimate, hold
from moetrain.memory.ledger import Ledger, Usage
from moetrain.moe.routers import topk

BIG = MODEL | {
    "dim": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "dense_hidden": 256, "vocab_size": 1024,
    "moe": MODEL["moe"] | {"num_experts": 8, "hidden": 128, "shared_hidden": 64},
}  # fmt: skip
LONG = TRAIN | {"micro_batch": 2, "seq_len": 128, "dtype": "float32"}
DEEP = BIG | {"num_layers": 4}
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
    "muon": (2, {"dp": 2}, {"optim": {"kind": "muon"}}),
}  # fmt: skip

LOOSE = "zbv of 4 ranks"
"""Its peak is at another moment than foretold, 1.7% higher."""


def measure(rank: int, world: int, cfg: Config, steps: int = 2) -> Usage:
    """The peak of a real run whose experts all get the same load."""

    def even(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
        T, E = scores_TE.shape
        return (torch.arange(T)[:, None] * k + torch.arange(k)) % E

    chosen, topk.top_k = topk.top_k, even
    try:
        run, ledger = trainer(rank, world, cfg), Ledger()
        hold(ledger, run)
        with ledger:
            for _ in range(steps):
                run.step()
        return ledger.peak()
    finally:
        topk.top_k = chosen


def apart(fn, *args, **kwargs):
    """In a process of its own: what torch remembers of a fake world is not for the ranks that are forked from this."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(fn, args, kwargs)


@pytest.mark.parametrize("case", drawn(CASES, 4, of="dry runs"))
def test_as_measured(ranks, small_corpus, tmp_path: Path, case) -> None:
    world, layout, groups = CASES[case]
    train = LONG | {"batch": (2 if layout.get("pp", 1) == 1 else 8) * 2 * layout.get("dp", 1)}
    cfg = config(small_corpus, tmp_path, **({"model": BIG} | groups), train=train, layout=layout)
    pp = layout.get("pp", 1)
    every = ranks(world).run(measure, cfg)
    for at in range(pp):
        foretold = apart(estimate, cfg, world=world, at=at)
        seen = max(every[at * world // pp : (at + 1) * world // pp], key=lambda u: u.total)
        off = {kind.value: (foretold.peak.by_kind[kind] - n) / seen.total for kind, n in seen.by_kind.items()}
        words = f"{case}, rank {at} of pp: {foretold.peak.total / seen.total - 1:+.4%} of {seen.total}"
        print(
            words, {k: f"{x:+.3%}" for k, x in off.items() if x}, foretold.micro_batches, foretold.peak.when, seen.when
        )
        limit, kinds = (0.03, 0.06) if case == LOOSE else (0.001, 0.001)
        assert foretold.peak.total == pytest.approx(seen.total, rel=limit), words
        assert max(map(abs, off.values())) < kinds, (words, off)
