"""A checkpoint of any layout loads under any other: bit for bit, and the run goes on as the unbroken one does."""

import logging
from pathlib import Path

import pytest
import torch
import whole
from drawn import ALL, drawn
from test_train import MODEL, TRAIN, close, config, trainer

from moetrain import checkpoint
from moetrain.job import Config
from moetrain.resume import Start
from moetrain.train import Trainer

BEFORE, AFTER = 3, 5
PINNED = {"row": 1.0, "hop": 0.0, "expert": 0.0, "hidden": 0.0}
FSSDP = {"placement": {"kind": "fssdp", "window": 2, "reshard_every": 2, "costs": PINNED}}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "one rank": (1, {}),
    "ep": (2, {"layout": {"dp": 2, "ep": 2}}),
    "pp, uneven stages": (2, {"layout": {"pp": 2}, "pipeline": {"stages": [1, 3]}}),
    "dp, nothing divides": (3, {"layout": {"dp": 3}, "sharding": {"dense": 2}}),
    "edp": (4, {"layout": {"dp": 4, "ep": 2}}),
    "tp cp etp": (4, {"layout": {"cp": 2, "tp": 2, "etp": 4}}),
    "ep folded over tp": (4, {"layout": {"dp": 2, "tp": 2, "ep": 4}, "sharding": {"experts": 2}}),
    "fssdp": (4, {"layout": {"dp": 4, "ep": 2}, "moe": FSSDP}),
    "fssdp in a pipeline": (4, {"layout": {"pp": 2, "dp": 2, "ep": 2}, "moe": FSSDP}),
    "hsdp": (8, {"layout": {"dp": 4, "tp": 2, "ep": 2, "replicate": 2}}),
    "interleaved": (8, {"layout": {"pp": 2, "dp": 2, "tp": 2, "ep": 4}, "pipeline": {"schedule": "interleaved"}}),
    "zbv": (8, {"layout": {"pp": 2, "dp": 4, "ep": 4}, "pipeline": {"schedule": "zbv"}}),
    "folded, 16 ranks": (16, {"layout": {"pp": 2, "dp": 2, "cp": 2, "tp": 2, "ep": 4, "etp": 2}}),
}
SMALL = [name for name, (world, _) in LAYOUTS.items() if ALL or world <= 4]
PAIRS = drawn([(a, b) for b in SMALL for a in SMALL], 4, of="resharding")


def cfg(corpus: Path, folder: Path, name: str) -> Config:
    groups = dict(LAYOUTS[name][1])
    balance = MODEL["moe"]["balance"] | {"lagged": {"kind": "switch", "coef": 0.05, "scope": "global_lagged"}}
    moe = MODEL["moe"] | {"balance": balance} | groups.pop("moe", {})
    train = TRAIN | {"steps": BEFORE + AFTER, "batch": 24, "micro_batch": 1}
    return config(corpus, folder, model=MODEL | {"num_layers": 4, "moe": moe}, train=train, **groups)


def goes_on(run: Trainer, steps: int) -> list[list[float]]:
    """Loss, balance losses and norm of each step."""
    found = []
    for _ in range(steps):
        result = run.step()
        parts = torch.cat([result.loss[None].double(), result.balance_J.double()])
        if run.world.size > 1:
            torch.distributed.all_reduce(parts)
        found.append([*parts.tolist(), result.norm.item()])
    return found


def begins(rank: int, world: int, cfg: Config) -> list[list[float]]:
    run = trainer(rank, world, cfg)
    found = goes_on(run, BEFORE)
    run.save()
    return found + (goes_on(run, AFTER) if world == 1 else [])


def loads(rank: int, world: int, cfg: Config, source: Path) -> tuple[list[str], list[list[float]]]:
    """What a report said was not restored, and the steps after it; saved again as it came."""
    run = trainer(rank, world, cfg)
    report = run.load(Start(source, own=False))
    tensors, meta = run.state()
    checkpoint.save(cfg.run.folder / source.parents[2].name, tensors, meta, group=run.world.host_group)
    return [*report.missing], goes_on(run, AFTER)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, list[list[float]]]]:
    return {}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if any(name == b for _, b in PAIRS)])
def test_loads_under_any_layout_bit_for_bit_and_goes_on(ranks, small_corpus, tmp_path_factory, sources, name) -> None:
    logging.getLogger("moetrain").handlers.clear()
    wanted = [a for a, b in PAIRS if b == name]
    for source in ["one rank", *wanted]:
        if source not in sources:
            folder = tmp_path_factory.mktemp("source") / "run"
            curves = ranks(LAYOUTS[source][0]).run(begins, cfg(small_corpus, folder, source))
            sources[source] = whole.newest(folder), curves[0]
    folder = tmp_path_factory.mktemp("loaded") / "run"
    straight = sources["one rank"][1]
    for source in wanted:
        path, before = sources[source]
        missing, curve = ranks(LAYOUTS[name][0]).run(loads, cfg(small_corpus, folder, name), path)[0]
        a, b = whole.tensors(path), whole.tensors(folder / path.parents[2].name)
        assert missing == []
        assert {n for n in a if not n.startswith("placement.")} == {n for n in b if not n.startswith("placement.")}
        assert [n for n in a if n in b and not torch.equal(a[n], b[n])] == [], source
        close(before, straight[: len(before)])
        close(curve, straight[BEFORE:])
        print(f"{source} -> {name}: {len(a)} tensors bit for bit, {AFTER} steps as the unbroken run's")


