"""Router health is the same under every layout, costs one all-reduce a logging step, and names a layer and a rank."""

import json
import logging
import math
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from test_train import MODEL, TRAIN, config, trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import comm
from moetrain.config import replace
from moetrain.job import Config
from moetrain.moe.experts import Experts
from moetrain.loop import Loop
from moetrain.saving import Saver
from moetrain.telemetry.health import Health, Reading

STEPS = 3
TOKENS = TRAIN["batch"] * TRAIN["seq_len"]
TOP3 = {"kind": "topk", "top_k": 3, "score": "sigmoid"}
CASES = {
    "dropless": {},
    "drops, top-3": {
        "model": MODEL | {"moe": MODEL["moe"] | {"dispatcher": {"kind": "capacity", "factor": 1.0}, "router": TOP3}}
    },
    "recompute, four layers": {"recompute": {"mode": "full"}, "model": MODEL | {"num_layers": 4}},
}
LAYOUTS = [
    (2, "dropless", {"dp": 2, "ep": 2}, {}),
    (2, "dropless", {"dp": 1, "cp": 2, "etp": 2}, {}),
    (2, "drops, top-3", {"dp": 1, "tp": 2, "ep": 2}, {}),
    (2, "recompute, four layers", {"pp": 2}, {"pipeline": {"schedule": "zbv"}}),
    (4, "dropless", {"dp": 1, "cp": 2, "tp": 2, "ep": 2, "etp": 2}, {}),
    (4, "drops, top-3", {"dp": 4, "ep": 2}, {}),
    (4, "recompute, four layers", {"pp": 2, "dp": 2, "ep": 2}, {"pipeline": {"schedule": "interleaved"}}),
]


def readings(rank: int, world: int, cfg: Config) -> list[tuple[Reading, dict[int, int]]]:
    """The health of each step, and how many rows this rank's experts of each layer computed in it, buffers whole."""
    run = trainer(rank, world, cfg)
    health = Health(cfg.health, layers=dict(zip(cfg.model.moe_layers, cfg.model.moe_configs, strict=True)), mesh=run.mesh)
    names = {layer.experts: layer.layer for layer in run.model.moe_layers()}
    rows: Counter[int] = Counter()
    right = Experts.forward

    def counted(self, given, backend, replicas=None):
        if torch._C._current_graph_task_id() == -1:  # not in backward
            rows[names[self]] += int(given.offsets_S[-1])
        return right(self, given, backend, replicas)

    Experts.forward, found = counted, []
    try:
        for _ in range(STEPS):
            rows.clear()
            result = run.step(watch=True)
            health.smooth(result.load_LE)
            flat = comm.all_reduce_(health.part(run.model.moe_layers()), group=run.all_ranks)
            reading = health.read(health.brief(flat, result.load_LE).tolist(), tokens=TOKENS)
            found.append((reading, dict(rows)))
    finally:
        Experts.forward = right
    return found


@pytest.fixture(scope="module")
def one_rank(small_corpus, tmp_path_factory):
    @cache
    def truth(case: str) -> list[tuple[Reading, dict[int, int]]]:
        return readings(0, 1, config(small_corpus, tmp_path_factory.mktemp("one") / "run", **CASES[case]))

    return truth


@pytest.mark.parametrize(("world", "case", "layout", "more"), LAYOUTS, ids=str)
def test_every_layout_reads_what_one_rank_reads(
    ranks, small_corpus, one_rank, tmp_path, world, case, layout, more
) -> None:
    cfg = config(small_corpus, tmp_path / "run", layout=layout, **(CASES[case] | more))
    got = ranks(world).run(readings, cfg)
    for step, (want, _) in enumerate(one_rank(case)):
        found = [rank[step][0] for rank in got]
        assert all(vars(f) == vars(found[0]) for f in found), "to the bit on every rank: they decide alike"
        first = found[0]
        assert first.load == want.load
        assert first.top_pair == want.top_pair
        for layer, values in want.layers.items():
            overload = first.layers[layer]["overload"]
            here = {"overload": overload, "home_overload": overload}
            assert first.layers[layer] == pytest.approx(values | here, rel=1e-9, abs=1e-12)
            assert values["overload"] == 1.0, "one rank is never fuller than the mean"
            assert overload >= 1.0
            assert values["top_pair"] > 1 / 28
            assert (values["drop_rate"] > 0) == case.startswith("drops")
            if not case.startswith("drops"):  # whose buffers are of one size
                rows = [n for rank in got if (n := rank[step][1].get(layer)) is not None]
                assert overload == pytest.approx(max(rows) * len(rows) / sum(rows)), "the rows that ranks computed"


def test_watching_changes_no_bit(small_corpus, tmp_path) -> None:
    float32 = TRAIN | {"dtype": "float32"}

    def steps(watch: bool) -> list[Tensor]:
        run = trainer(0, 1, config(small_corpus, tmp_path / "run", train=float32, recompute={"mode": "full"}))
        losses = [run.step(watch=watch).loss for _ in range(2)]
        return [*losses, *run.model.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(steps(True), steps(False), strict=True))


class Seen(TorchDispatchMode):
    """Collectives with their bytes, and reads of the device: in a step of the loop."""

    READS = ("item", "tolist", "cpu", "numpy")

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            flat = torch.utils._pytree.tree_leaves(args)
            self.collectives.append((func.__name__, sum(x.nbytes for x in flat if isinstance(x, Tensor))))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        def counted(read):
            def call(x, *args, **kwargs):
                self.reads += 1
                return read(x, *args, **kwargs)

            return call

        self._own = [name for name in self.READS if name in vars(Tensor)]
        self._right = {name: getattr(Tensor, name) for name in self.READS}
        for name, read in self._right.items():
            setattr(Tensor, name, counted(read))
        return super().__enter__()

    def __exit__(self, *raised):
        for name, read in self._right.items():
            setattr(Tensor, name, read) if name in self._own else delattr(Tensor, name)
        return super().__exit__(*raised)


def costs(rank: int, world: int, cfg: Config) -> list[tuple[list[tuple[str, int]], int]]:
    """Of each step: its collectives, and how often the host read the device."""
    cfg.run.folder.mkdir(parents=True, exist_ok=True)
    run = trainer(rank, world, cfg)
    loop, found = Loop(run, Saver(cfg.checkpoint, run.world, cfg.run.folder, None), logging.getLogger("test")), []
    for _ in range(9):
        with Seen() as seen:
            loop.step()
        found.append((seen.collectives, seen.reads))
    loop.close()
    return found


def test_one_all_reduce_a_logging_step_and_nothing_between(ranks, small_corpus, tmp_path) -> None:
    layout = {"dp": 2, "ep": 2}
    cfg = config(
        small_corpus, tmp_path / "run", layout=layout, logging={"every": 4, "progress": False}, train=TRAIN | {"steps": 99}
    )
    with_health = ranks(2).run(costs, cfg)[0]
    without = ranks(2).run(costs, replace(cfg, health=replace(cfg.health, enabled=False)))[0]
    E, world = 8, 2
    layers = len(cfg.model.moe_layers)
    for step, ((calls, reads), (bare_calls, bare_reads)) in enumerate(zip(with_health, without, strict=True), 1):
        assert reads == bare_reads, "no read of its own: its numbers come with the others"
        assert len(calls) == len(bare_calls), "no collective of its own: its numbers go with the others"
        logged = step == 1 or step % 4 == 0
        more = sum(size for _, size in calls) - sum(size for _, size in bare_calls)
        assert more == (8 * layers * (1 + 1 + world + 2 + E * (E - 1) // 2) if logged else 0)
        print(f"step {step}: {len(calls)} collectives, {more} bytes more, {reads} reads")
    between, logging_step = without[1], without[3]
    assert len(logging_step[0]) == len(between[0]) + 1
    assert logging_step[1] == between[1] + 1


def poisoned(rank: int, world: int, cfg: Config) -> str:
    cfg.run.folder.mkdir(parents=True, exist_ok=True)
    run = trainer(rank, world, cfg)
    if rank == 1:
        gate = run.model.blocks["2"].moe.gate
        right = gate.forward
        gate.forward = lambda x, carry: ((found := right(x, carry))[0] * math.nan, found[1])
    loop = Loop(run, Saver(cfg.checkpoint, run.world, cfg.run.folder, None), logging.getLogger("test"))
    try:
        loop.step()
    except RuntimeError as e:
        return str(e)
    return ""


def test_a_nan_logit_is_named_with_its_layer_and_rank(ranks, small_corpus, tmp_path) -> None:
    cfg = config(small_corpus, tmp_path / "run", layout={"dp": 2, "ep": 2}, bad_steps={"skip": False})
    for said in ranks(2).run(poisoned, cfg):
        assert said.startswith("step 1: loss nan")
        assert ", largest router logit nan in layer 2 on rank 1: not finite" in said


def test_two_ranks_stop_together_with_exit_code_3(small_corpus, tmp_path: Path) -> None:
    words = [
        "layout.ep=2", "model.vocab_size=512", "model.dim=16", "model.num_layers=1", "model.num_heads=2",
        "model.num_kv_heads=2", "model.moe.num_experts=4", "model.moe.hidden=16", "train.steps=50", "train.batch=4",
        "train.micro_batch=2", "train.seq_len=16", "train.device=cpu", "train.threads=1", "train.validate_samples=4",
        "optim.warmup=1", "logging.every=2", "data=folder", f"data.corpora.text.path={small_corpus}",
        f"run.dir={tmp_path}", "run.name=run",
        "health.alerts=[{metric: overload, above: 0.5, action: stop, after: 3}]",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", "train", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.startswith("stopped and saved at step 4: overload of layer 0 is ")
    assert done.stderr.count("\n") == 1
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000004"]
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
