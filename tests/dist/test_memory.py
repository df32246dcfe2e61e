"""Bytes of a rank: between steps what the layout promises, at the peak of a step no more than two FSDP units on top."""

import itertools
import math
from pathlib import Path

import pytest
from drawn import drawn
from test_train import MODEL, TRAIN, config, trainer

from moetrain.job import Config
from moetrain.memory.ledger import Ledger, alive

BIG = MODEL | {
    "dim": 128, "num_layers": 3, "num_heads": 8, "num_kv_heads": 8, "dense_hidden": 1024,
    "moe": MODEL["moe"] | {"hidden": 512, "shared_hidden": 256},
}  # fmt: skip
TINY = TRAIN | {"micro_batch": 1, "seq_len": 4, "dtype": "float32"}


def cuts(cfg: Config, name: str, world: int) -> tuple[int, int]:
    """Into how many parts the layout cuts a parameter, and FSDP each of those: told from the layout alone."""
    n = cfg.layout
    if ".experts." in name:
        edp = world // (n.ep * n.etp)
        return n.ep * n.etp, edp // math.gcd(edp, n.replicate)
    whole = any(word in name for word in ("norm", "gate.weight")) and ".ffn." not in name
    return 1 if whole else n.tp, world // n.tp // n.replicate


def measure(rank: int, world: int, cfg: Config) -> dict[str, float]:
    before = alive()
    run = trainer(rank, world, cfg)
    run.step()
    resident = alive() - before
    with Ledger() as ledger:
        run.step()
    weights, units = 0.0, {}  # of a unit: its weights when FSDP has gathered them
    for name, held in run.plan.items():
        parts, shards = cuts(cfg, name, world)
        unit = name.rpartition(".experts.")[0] if ".experts." in name else ".".join(name.split(".")[:2])
        units[unit] = units.get(unit, 0) + math.prod(held.shape) * 4 / parts
        weights += math.prod(held.shape) * 4 / parts / shards
    return {
        "resident": resident, "promised": 3 * weights, "peak": ledger.peak().total, "grads": weights,
        "two units": sum(sorted(units.values())[-2:]), "all units": sum(units.values()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def activations(small_corpus, tmp_path_factory) -> float:
    """Bytes of a micro-batch's activations and temporaries: one rank's peak without its gradients."""
    one = measure(0, 1, config(small_corpus, tmp_path_factory.mktemp("m") / "1", model=BIG, train=TINY | {"batch": 2}))
    assert one["resident"] == pytest.approx(one["promised"], rel=0.05)
    return one["peak"] - one["grads"]


LAYOUTS = {
    2: [{"tp": 2}, {"cp": 2, "etp": 2}],
    4: [{"dp": 4}, {"dp": 2, "tp": 2, "ep": 2}],
    8: [{"dp": 4, "tp": 2, "ep": 2, "replicate": 2}],
}


PLACES = [(world, layout) for world, several in LAYOUTS.items() for layout in several]


@pytest.mark.parametrize(
    ("place", "accumulate"), drawn(itertools.product(PLACES, ["sharded", "local"]), 4, of="memory"), ids=str
)
def test_resident_and_peak(ranks, small_corpus, tmp_path: Path, activations, place, accumulate) -> None:
    world, layout = place
    train = TINY | {"batch": 2 * layout.get("dp", 1)}
    cfg = config(
        small_corpus, tmp_path, model=BIG, train=train, layout=layout, sharding={"accumulate": accumulate}
    )  # fmt: skip
    for got in ranks(world).run(measure, cfg):
        words = f"{got} activations {activations}"
        assert got["resident"] == pytest.approx(got["promised"], rel=0.05), words
        unsharded = got["all units"] if accumulate == "local" else 0
        assert got["peak"] <= got["grads"] + got["two units"] + unsharded + activations, words
