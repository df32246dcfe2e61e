"""Some steps under every layout are the same run: losses, norms, loads, and every tensor of the checkpoint."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import whole
from drawn import drawn
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.config import config as config_node
from moetrain.config import load, replace
from moetrain.job import Config, open_data
from moetrain.moe.gates.linear import LinearGate
from moetrain.moe.routers.replay import save_choices
from moetrain.moe.placement.types import Costs, Grid, Placement, PlacementPolicy
from moetrain.optim import grad_norm
from moetrain.resume import Start
from moetrain.train import Seen, Trainer
from moetrain.world import World

STEPS = 3
BALANCE = {
    "switch": {"kind": "switch", "coef": 0.05},
    "sequence": {"kind": "sequence", "coef": 0.02},
    "z_loss": {"kind": "z_loss", "coef": 0.01},
    "expert_bias": {"kind": "expert_bias", "rate": 0.01},
}
MODEL = {
    "vocab_size": 512, "dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "first_dense": 1,
    "dense_hidden": 48, "qk_norm": "head", "init_std": 0.1,
    "moe": {"num_experts": 8, "hidden": 24, "shared_hidden": 16, "shared_gate": True, "balance": BALANCE},
}  # fmt: skip
TRAIN = {
    "steps": STEPS, "batch": 8, "micro_batch": 2, "seq_len": 20, "dtype": "float64", "device": "cpu",
    "validate_samples": 5,
}  # fmt: skip
LAYOUTS = {
    2: [{"dp": 2}, {"dp": 1, "tp": 2, "ep": 2}, {"dp": 1, "cp": 2, "etp": 2}],
    4: [{"dp": 4, "ep": 2}, {"dp": 1, "cp": 2, "tp": 2, "ep": 2, "etp": 2}],
}


def layouts(world: int, model: dict) -> list[dict]:
    return [n for n in LAYOUTS[world] if model["num_heads"] % n.get("tp", 1) == 0]


def config(corpus: Path, folder: Path, **groups: dict) -> Config:
    """A small run; ``groups`` are merged over it one level deep."""
    base: dict = {
        "seed": 3, "model": MODEL, "train": TRAIN, "optim": {"lr": 1e-2, "warmup": 2, "clip": 0.5},
        "data": {"corpora": {"small": {"path": str(corpus)}}}, "run": {"dir": str(folder.parent), "name": folder.name},
    }  # fmt: skip
    for name, keys in groups.items():
        base[name] = base.get(name, {}) | keys
    return load(base, Config)


def trainer(rank: int, world: int, cfg: Config) -> Trainer:
    group = dist.group.WORLD if world > 1 else None
    here = World(rank, world, rank, world, torch.device("cpu"), "gloo" if world > 1 else "", group)
    return Trainer(cfg, here, open_data(cfg, log=lambda line: None))


def curve(rank: int, world: int, cfg: Config, steps: int = STEPS, resume: Path | None = None) -> list[list[float]]:
    """Loss, norm, loads and balance losses of each step, summed over ranks where each holds a part; then saves.

    The last step has the held-out loss too.
    """
    run = trainer(rank, world, cfg)
    if resume is not None:
        run.load(Start(resume))
    found = []
    for _ in range(steps):
        result = run.step()
        parts = torch.cat([result.loss[None].double(), result.balance_J.double(), result.dropped[None].double()])
        if world > 1:
            dist.all_reduce(parts)
        found.append([*parts.tolist(), result.norm.item(), *result.load_LE.flatten().tolist()])
    found[-1] += [score.nats_per_token for score in run.validate().values()]
    run.save()
    return found


def close(got: list[list[float]], want: list[list[float]]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-9, atol=1e-9)


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).double().norm() / max(b.double().norm().item(), 1e-12)).item()


CASES = {
    "dropless": {},
    "capacity": {"model": MODEL | {"moe": MODEL["moe"] | {"dispatcher": {"kind": "capacity", "factor": 1.0}}}},
    "sharded accumulation": {"sharding": {"accumulate": "sharded", "dense": 2, "experts": 2}},
    "batch ramp, tied embeddings": {
        "train": TRAIN | {"batch": 16, "ramp": {"start": 8, "increment": 8, "samples": 12}},
        "model": MODEL | {"tie_embeddings": True},
    },
    "document masks, ignored targets": {},
    "nothing divides evenly": {
        "model": MODEL
        | {"dim": 18, "num_heads": 3, "num_kv_heads": 1, "dense_hidden": 7, "qk_norm": "full"}
        | {"moe": MODEL["moe"] | {"num_experts": 12, "hidden": 5, "router": {"kind": "topk", "top_k": 3}}}
    },
}


@pytest.fixture(scope="module")
def one_rank(small_corpus, tmp_path_factory):
    """Case -> (its groups, the curve of one rank, the tensors it saved), each made once, in this process."""

    @cache
    def truth(case: str) -> tuple[dict, list[list[float]], dict[str, Tensor]]:
        groups = dict(CASES[case])
        if case.startswith("document"):
            data = {"corpora": {"small": {"path": str(small_corpus)}}}
            groups["data"] = data | {"mask_documents": True, "ignore_tokens": [5, 300]}
        cfg = config(small_corpus, tmp_path_factory.mktemp("one") / "run", **groups)
        return groups, curve(0, 1, cfg), whole.tensors(whole.newest(cfg.run.folder))

    return truth


@pytest.mark.parametrize("case", CASES)
def test_one_rank_learns_and_drops_only_where_it_should(one_rank, case) -> None:
    _, want, _ = one_rank(case)
    assert want[0][0] > want[-1][0], "the loss falls"
    assert (want[0][4] > 0) == (case == "capacity"), "capacity 1.0 drops something, the others nothing"


def trials(worlds: dict[int, Iterable[str]]) -> list[tuple[int, str, dict]]:
    """(ranks, case, layout)."""
    models = {case: groups.get("model", MODEL) for case, groups in CASES.items()}
    return [(world, case, n) for world, cases in worlds.items() for case in cases for n in layouts(world, models[case])]


ON_FOUR = ("dropless", "capacity", "document masks, ignored targets")
EVERY = drawn(trials({2: CASES, 4: ON_FOUR}), 7, of="layouts")


@pytest.mark.parametrize(("world", "case", "layout"), EVERY, ids=str)
def test_the_steps_are_the_same_under_every_layout(ranks, small_corpus, one_rank, tmp_path, world, case, layout) -> None:
    groups, want, saved = one_rank(case)
    cfg = config(small_corpus, tmp_path / "run", layout=layout, **groups)
    got = ranks(world).run(curve, cfg)
    assert all(g == got[0] for g in got), "ranks agree"
    close(got[0], want)
    for name, tensor in whole.tensors(whole.newest(cfg.run.folder)).items():
        assert error(tensor, saved[name]) < 1e-9, f"{name} after {STEPS} steps"


@config_node
class Permuted(PlacementPolicy):
    """Expert ids shuffled, ranks of a row owning different numbers of them."""

    def __call__(self, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> Placement:
        ep = grid.ep
        sizes = {1: [8], 2: [5, 3], 4: [3, 1, 2, 2]}[ep]
        shuffled = (torch.arange(8) * 5 + 3) % 8
        row_RS, owner_E = torch.full((ep, max(sizes)), -1), torch.empty(8, dtype=torch.int64)
        for r, ids in enumerate(shuffled.split(sizes)):
            row_RS[r, : len(ids)] = ids
            owner_E[ids] = r
        return Placement(row_RS.repeat(grid.edp, 1), owner_E, span=ep)


OWNED = drawn(trials({2: ["dropless"], 4: ["capacity"]}), 2, of="owner maps")


@pytest.mark.parametrize(("world", "case", "layout"), OWNED, ids=str)
def test_a_permuted_uneven_owner_map_is_the_same_run(
    ranks, small_corpus, one_rank, tmp_path, world, case, layout
) -> None:
    groups, want, saved = one_rank(case)
    cfg = config(small_corpus, tmp_path / "run", layout=layout, **groups)
    cfg = replace(cfg, model=replace(cfg.model, moe=replace(cfg.model.moe, placement=Permuted())))
    got = ranks(world).run(curve, cfg)
    close(got[0], want)
    for name, tensor in whole.tensors(whole.newest(cfg.run.folder)).items():
        assert error(tensor, saved[name]) < 1e-9, name


def test_float32_losses_agree_to_1e_5(ranks, small_corpus, tmp_path) -> None:
    curves = []
    for world, layout in ((1, {}), (2, {"ep": 2}), (4, {"dp": 4, "ep": 2})):
        cfg = config(small_corpus, tmp_path / str(world), layout=layout, train=TRAIN | {"dtype": "float32"})
        curves.append(torch.tensor([step[0] for step in ranks(world).run(curve, cfg)[0]]))
    for other in curves[1:]:
        torch.testing.assert_close(other, curves[0], rtol=1e-5, atol=1e-5)


RESUMED = [{}, {"ep": 2}, {"dp": 1, "tp": 2}, {"dp": 1, "cp": 2}]


@pytest.mark.parametrize("layout", drawn(RESUMED, 2, of="resume"), ids=str)
def test_resume_is_bit_exact_in_float32(ranks, small_corpus, tmp_path, layout) -> None:
    pool = ranks(1 if not layout else 2)
    float32 = TRAIN | {"dtype": "float32", "steps": 4}
    unbroken, parts = (config(small_corpus, tmp_path / n, layout=layout, train=float32) for n in ("unbroken", "parts"))
    want = pool.run(curve, unbroken, 4)[0]
    first = pool.run(curve, parts, 2)[0]
    second = pool.run(curve, parts, 2, whole.newest(parts.run.folder))[0]
    assert [first[0], first[1][:-1], *second] == want, "but for the held-out loss at 2"
    a, b = whole.tensors(whole.newest(unbroken.run.folder)), whole.tensors(whole.newest(parts.run.folder))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_under_another_layout_continues_the_same_run(ranks, small_corpus, tmp_path) -> None:
    float64 = TRAIN | {"steps": 4}
    want = ranks(1).run(curve, config(small_corpus, tmp_path / "unbroken", train=float64), 4)[0]
    start = config(small_corpus, tmp_path / "start", layout={"dp": 2, "tp": 2, "ep": 2, "etp": 2}, train=float64)
    ranks(4).run(curve, start, 2)
    for world, layout in ((1, {}), (2, {"ep": 2}), (4, {"dp": 1, "cp": 2, "tp": 2, "ep": 4})):
        cfg = config(small_corpus, tmp_path / f"on{world}", layout=layout, train=float64)
        got = ranks(world).run(curve, cfg, 2, whole.newest(start.run.folder))[0]
        close(got, want[2:])


def norms(rank: int, world: int, cfg: Config) -> tuple[float, float]:
    """The global gradient norm of a step, and that of its experts."""
    run, seen = trainer(rank, world, cfg), Seen()
    norm = run.step(seen=seen).norm
    experts = [g for n, g in seen.grads.items() if ".experts." in n and run.plan[n].counted]
    return norm.item(), grad_norm(experts, group=run.all_ranks, like=torch.zeros(())).item()


def test_grad_norm_counts_every_expert_once(ranks, small_corpus, tmp_path) -> None:
    alone = ranks(1).run(norms, config(small_corpus, tmp_path / "1"))[0]
    assert 0 < alone[1] < alone[0]
    for layout in ({"ep": 4}, {"dp": 4, "ep": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "cp": 2, "replicate": 2, "etp": 2}):
        for found in ranks(4).run(norms, config(small_corpus, tmp_path / "4", layout=layout)):
            assert found == pytest.approx(alone, rel=1e-12)


def test_a_parameter_without_a_gradient_is_named(small_corpus, tmp_path, monkeypatch) -> None:
    run = trainer(0, 1, config(small_corpus, tmp_path / "1"))
    right = LinearGate.forward
    monkeypatch.setattr(LinearGate, "forward", lambda self, x, carry: (right(self, x, carry)[0].detach(), carry))
    with pytest.raises(RuntimeError, match=r"no gradient reached blocks\.1\.moe\.gate\.weight, blocks\.2"):
        run.step()


def record(rank: int, world: int, cfg: Config, path: Path) -> list[float]:
    """One rank's losses over two steps; leaves its choices, with one token's changed, in a file."""
    run = trainer(rank, world, cfg)
    table, first, found = {}, {}, []
    for step in range(2):
        first[step] = run.consumed
        seen = Seen()
        found.append(run.step(seen=seen).loss.item())
        table[step] = {layer: torch.cat([ids[layer] for ids in seen.ids]) for layer in seen.ids[0]}
    save_choices(path / "exact", table, first_sample=first)
    other = table[0][1][3, 5]
    other.copy_((other + 1) % 8)
    save_choices(path / "changed", table, first_sample=first)
    return found


def replayed(rank: int, world: int, cfg: Config) -> list[float]:
    run = trainer(rank, world, cfg)
    found = torch.stack([run.step().loss for _ in range(2)])
    if world > 1:
        dist.all_reduce(found)
    return found.tolist()


def test_replayed_choices_are_those_that_were_recorded(ranks, small_corpus, tmp_path) -> None:
    want = ranks(1).run(record, config(small_corpus, tmp_path / "r"), tmp_path)[0]
    for world, layout in ((1, {}), (2, {"ep": 2})):
        losses = {}
        for name in ("exact", "changed"):
            moe = MODEL["moe"] | {"router": {"kind": "replay", "path": str(tmp_path / name)}}
            cfg = config(small_corpus, tmp_path / "x", layout=layout, model=MODEL | {"moe": moe})
            losses[name] = ranks(world).run(replayed, cfg)[0]
        assert losses["exact"] == pytest.approx(want, rel=1e-9)
        assert abs(losses["changed"][0] - want[0]) > 1e-6, "one token's other experts are felt"
