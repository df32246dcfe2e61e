"""Models with all kinds of zero-computation experts are the same run under every layout, saved and resumed too."""

from pathlib import Path

import pytest
from drawn import drawn
from test_health_ranks import readings
from test_train import MODEL as SMALL
from test_train import TRAIN, close, config, curve
from test_verify import Pool

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.config import load
from moetrain.job import Config
from moetrain.layouts import Layout
from moetrain.verify.outcome import Outcome
from moetrain.verify.report import table
from moetrain.verify.session import make_reference, verify

EXTRA = {"zero": 1, "copy": 1, "constant": 2, "nulls": 2, "weight": 0.75}
BALANCE = {
    "switch": {"kind": "switch", "coef": 0.05},
    "sequence": {"kind": "sequence", "coef": 0.02},
    "expert_bias": {"kind": "expert_bias", "rate": 0.01},
}
MOE = {
    "num_experts": 8, "hidden": 12, "shared_hidden": 6, "zero_computation": EXTRA, "balance": BALANCE,
    "router": {"kind": "topk", "top_k": 3},
}  # fmt: skip
MODEL = {
    "vocab_size": 100, "dim": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.1, "moe": MOE,
}  # fmt: skip
DROPS = {"model": {"moe": MOE | {"dispatcher": {"kind": "capacity", "factor": 1.0}}}, "train": {"batch": 8}}
FULL, MOE_AGAIN = {"mode": "full"}, {"mode": "selective", "parts": ["norm", "moe"]}
CASES = {  # ranks, layout, other nodes
    "ep8": (8, Layout(dp=8, ep=8), {}),
    "tp, cp, etp": (8, Layout(dp=2, cp=2, tp=2, ep=4, etp=2), {"recompute": MOE_AGAIN}),
    "interleaved": (8, Layout(pp=2, dp=4, ep=4), {"pipeline": {"schedule": "interleaved"}, "recompute": FULL}),
    "zero bubble": (4, Layout(pp=2, dp=1, tp=2, ep=2), {"pipeline": {"schedule": "zbv"}, "recompute": MOE_AGAIN}),
    "drops": (2, Layout(dp=2, ep=2), DROPS),
    "drops, tp, cp": (4, Layout(dp=1, cp=2, tp=2, ep=2), DROPS | {"recompute": FULL}),
    "allgather, sharded, copies": (
        4, Layout(dp=4, ep=2, replicate=2),
        {"model": {"moe": MOE | {"dispatcher": {"kind": "allgather"}}}, "sharding": {"accumulate": "sharded", "dense": 2}},
    ),
    "muon": (4, Layout(dp=2, tp=2, ep=4), {"optim": {"kind": "muon", "warmup": 0}}),
}  # fmt: skip


def job(**nodes: dict) -> Config:
    train = {
        "steps": 1, "batch": 16, "micro_batch": 2, "seq_len": 13, "dtype": "float64", "device": "cpu", "threads": 1,
    }  # fmt: skip
    base: dict = {"seed": 3, "model": MODEL, "train": train, "optim": {"warmup": 0}, "data": {"mask_documents": True}}
    return load(base | {name: base.get(name, {}) | node for name, node in nodes.items()}, Config)


@pytest.mark.parametrize("name", drawn(CASES, 2, of="zero-computation experts"))
def test_layouts_are_the_run_of_one_rank(ranks, tmp_path, name) -> None:
    world, layout, more = CASES[name]
    cfg, pool = job(**more), Pool(ranks(world))
    reference = make_reference(cfg, pool, tmp_path / "reference")
    truth = Outcome(reference.folder)
    load_C = sum(truth.read([f"load.{layer}" for layer in truth.layers]).values())
    assert len(load_C) == 8 + 6  # pyright: ignore
    assert load_C.min() > 0, "somebody chose each of them"  # pyright: ignore
    assert (truth.numbers["dropped"] > 0) == name.startswith("drops")
    vectors = [n for n in truth.parameters if n.endswith("vector")]
    assert all(g.norm() > 0 for g in truth.read([f"grad.{n}" for n in vectors]).values())
    assert len(vectors) == 2 * len(truth.layers)
    verdict = verify(layout, reference, pool, tmp_path / "layout")
    assert verdict.report is not None, verdict.error
    assert verdict.kind == "same", "\n".join(table(verdict.report))


def test_saved_under_one_layout_and_resumed_under_another(ranks, small_corpus, tmp_path: Path) -> None:
    more = {"dispatcher": {"kind": "capacity", "factor": 1.0}, "router": {"kind": "topk", "top_k": 3}}
    model = {"moe": SMALL["moe"] | more | {"zero_computation": EXTRA}}

    def run(name: str, **layout: int) -> Config:
        return config(small_corpus, tmp_path / name, model=model, layout=layout)

    want = curve(0, 1, run("one"))
    first = ranks(2).run(curve, run("two", dp=1, tp=2, ep=2), 2)[0]
    resumed = ranks(4).run(curve, run("four", dp=2, cp=2, ep=2, etp=2), 1, tmp_path / "two/checkpoints/step-00000002")
    close([row[: len(want[0])] for row in first], want[:2])
    close(resumed[0], want[2:])


def test_health_is_the_same_under_a_layout(ranks, small_corpus, tmp_path) -> None:
    model = {"moe": SMALL["moe"] | {"zero_computation": EXTRA}}
    want = readings(0, 1, config(small_corpus, tmp_path / "one", model=model))
    got = ranks(4).run(readings, config(small_corpus, tmp_path / "run", model=model, layout={"dp": 2, "tp": 2, "ep": 4}))
    for step, (truth, _) in enumerate(want):
        found, layer = got[0][step][0], next(iter(truth.layers))
        assert found.load == truth.load
        assert len(found.load[0]) == 8 + 6
        for layer, values in truth.layers.items():
            overload = found.layers[layer]["overload"]
            assert found.layers[layer] == pytest.approx(
                values | {"overload": overload, "home_overload": overload}, rel=1e-9, abs=1e-12
            )
            assert values["overload"] == 1.0
            assert 0 < values["ffn_experts"] < 2
            rows = [rank[step][1][layer] for rank in got]
            assert overload == pytest.approx(max(rows) * len(rows) / sum(rows)), "the rows that ranks computed"
            assert sum(rows) == pytest.approx(values["ffn_experts"] * TRAIN["batch"] * TRAIN["seq_len"]), "none more sent"
