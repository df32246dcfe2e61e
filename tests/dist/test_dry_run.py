"""What a dry run foretells is what the same run on real tensors is seen to hold."""

import itertools
from pathlib import Path

import pytest
import torch
from test_train import MODEL, TRAIN, config, trainer

from moetrain.job import Config
from moetrain.memory.dry import estimate, hold
from moetrain.memory.ledger import Kind, Ledger, Usage
from moetrain.moe.routers import topk

BIG = MODEL | {
    "dim": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "dense_hidden": 256, "vocab_size": 1024,
    "moe": MODEL["moe"] | {"num_experts": 8, "hidden": 128, "shared_hidden": 64},
}  # fmt: skip
LONG = TRAIN | {"micro_batch": 2, "seq_len": 128, "dtype": "float32"}
LAYOUTS = {
    2: [{"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}, {"cp": 2, "etp": 2}, {"dp": 2}],
    4: [{"dp": 4}, {"dp": 2, "tp": 2, "ep": 2}, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}, {"dp": 4, "ep": 4}],
}
SHARDING = [{"accumulate": "local"}, {"accumulate": "sharded"}, {"dense": 2, "experts": 2}]


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


@pytest.mark.parametrize("world", LAYOUTS)
def test_as_measured(ranks, small_corpus, tmp_path: Path, world) -> None:
    for layout, sharding in zip(LAYOUTS[world], itertools.cycle(SHARDING)):
        train = LONG | {"batch": 4 * layout.get("dp", 1)}
        cfg = config(small_corpus, tmp_path, model=BIG, train=train, layout=layout, sharding=sharding)
        foretold = estimate(cfg, world=world).peak
        seen = max(ranks(world).run(measure, cfg), key=lambda u: u.total)
        words = f"{layout} {sharding}\n  foretold {foretold}\n  seen {seen}"
        for kind in Kind:
            assert foretold.by_kind[kind] == pytest.approx(seen.by_kind[kind], abs=0.001 * seen.total), words
        assert foretold.total == pytest.approx(seen.total, rel=0.001), words
