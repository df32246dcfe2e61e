"""Muon under every way to cut a matrix is Muon on one rank; its collectives; its state in a checkpoint."""

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import whole
from drawn import drawn
from test_train import MODEL, TRAIN, close, config, curve, error, trainer

from moetrain.job import Config

OPTIM = {"kind": "muon", "lr": 1e-2, "warmup": 2, "clip": 0.5}
EVEN = MODEL | {"num_layers": 2}
ODD = MODEL | {
    "num_layers": 2, "dim": 18, "num_heads": 4, "num_kv_heads": 1, "head_dim": 6, "dense_hidden": 7, "qk_norm": "full",
    "moe": MODEL["moe"] | {"num_experts": 12, "hidden": 5, "shared_hidden": 3},
}  # fmt: skip
LAYOUTS = [
    (2, {"dp": 1, "tp": 2, "etp": 2}),
    (2, {"dp": 2, "ep": 2}),
    (4, {"dp": 4, "replicate": 2}),
    (4, {"dp": 1, "tp": 4, "etp": 4}),  # one key head on all four, or two on two each
    (4, {"dp": 2, "tp": 2, "ep": 2, "replicate": 2}),
    (4, {"dp": 1, "cp": 2, "tp": 2, "ep": 2, "etp": 2}),
]
CASES = {"even": EVEN, "nothing divides evenly": ODD}


@pytest.fixture(scope="module")
def one_rank(small_corpus, tmp_path_factory):
    @cache
    def truth(case: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
        cfg = config(small_corpus, tmp_path_factory.mktemp("one") / "run", model=CASES[case], optim=OPTIM)
        return curve(0, 1, cfg), whole.tensors(whole.newest(cfg.run.folder))

    return truth


TRIALS = drawn([(world, layout, case) for world, layout in LAYOUTS for case in CASES], 3, of="muon")


@pytest.mark.parametrize(("world", "layout", "case"), TRIALS, ids=str)
def test_the_steps_are_those_of_one_rank(ranks, small_corpus, one_rank, tmp_path, world, layout, case) -> None:
    want, saved = one_rank(case)
    assert want[0][0] > want[-1][0], "the loss falls"
    assert "optim.momentum.blocks.0.attention.k.weight" in saved
    cfg = config(small_corpus, tmp_path / "run", model=CASES[case], optim=OPTIM, layout=layout)
    got = ranks(world).run(curve, cfg)
    assert all(g == got[0] for g in got), "ranks agree"
    close(got[0], want)
    found = whole.tensors(whole.newest(cfg.run.folder))
    assert found.keys() == saved.keys()
    for name, tensor in found.items():
        assert error(tensor, saved[name]) < 1e-9, name


def test_float32_weights_agree_to_1e_5(ranks, small_corpus, tmp_path) -> None:
    """After one step; the momentum too, which is a gradient."""
    float32 = TRAIN | {"dtype": "float32", "steps": 2}
    saved = []
    for world, layout in ((1, {}), (4, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}), (4, {"dp": 1, "cp": 2, "tp": 2})):
        cfg = config(small_corpus, tmp_path / str(len(saved)), model=EVEN, optim=OPTIM, layout=layout, train=float32)
        ranks(world).run(curve, cfg, 1)
        saved.append(whole.tensors(whole.newest(cfg.run.folder)))
    for other in saved[1:]:
        for name in (n for n in saved[0] if n.startswith("model.blocks") and "bias" not in n):
            assert error(other[name], saved[0][name]) < 1e-5, name


def counted(rank: int, world: int, cfg: Config) -> tuple[list[int], list[int], int]:
    """Calls of all_to_all_single in an optimizer step, elements sent to each rank, units computed here."""
    run = trainer(rank, world, cfg)
    muon, calls = run.optimizer.muon, []
    assert muon is not None
    right = dist.all_to_all_single
    grads = {n: torch.randn_like(p) for n, p in muon.params.items()}
    dist.all_to_all_single = lambda out, x, *rest, **more: calls.append(x.numel()) or right(out, x, *rest, **more)
    try:
        muon.step(grads, lr=1e-3, scale=None)
    finally:
        dist.all_to_all_single = right
    (batch,) = muon.batches
    return calls, batch.there.out_counts, sum(len(units) for units in batch.mine.values())


def test_two_all_to_alls_a_step_and_every_unit_on_one_rank(ranks, small_corpus, tmp_path) -> None:
    units = 2 * 4 + 3 + 3 + 2 * 8  # attention, the dense layer, the shared expert, experts' gate_up and down
    for layout in ({"dp": 4, "ep": 4}, {"dp": 2, "tp": 2, "replicate": 2, "ep": 2}):
        cfg = config(small_corpus, tmp_path, model=EVEN, optim=OPTIM, layout=layout)
        found = ranks(4).run(counted, cfg)
        assert [len(calls) for calls, _, _ in found] == [2] * 4
        assert sum(computed for *_, computed in found) == units
        assert all(computed for *_, computed in found)
    cfg = config(small_corpus, tmp_path, model=EVEN, optim=OPTIM)
    assert ranks(1).run(counted, cfg)[0][0] == []


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bfloat16_state_does_not_depend_on_the_layout(ranks, small_corpus, tmp_path, kind) -> None:
    """Elements that differ by rounding may round to neighbours: nothing is further apart than that."""
    optim, saved = OPTIM | {"kind": kind, "state_dtype": "bfloat16"}, []
    for world, layout in ((1, {}), (4, {"dp": 2, "tp": 2, "ep": 2, "replicate": 2})):
        cfg = config(small_corpus, tmp_path / str(world), model=EVEN, optim=optim, layout=layout)
        ranks(world).run(curve, cfg, 1)
        saved.append(whole.tensors(whole.newest(cfg.run.folder)))
    for name, tensor in saved[0].items():
        if name.startswith("optim."):
            assert tensor.dtype is torch.bfloat16
            torch.testing.assert_close(saved[1][name], tensor, rtol=2**-7, atol=1e-12)
        else:
            assert error(saved[1][name], tensor) < 1e-9, f"{name}: the update is made before the rounding"


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_resume_is_bit_exact_in_float32(ranks, small_corpus, tmp_path, state_dtype) -> None:
    float32, optim = TRAIN | {"dtype": "float32", "steps": 4}, OPTIM | {"state_dtype": state_dtype}
    layout = {"dp": 1, "tp": 2, "etp": 2}
    unbroken, parts = (
        config(small_corpus, tmp_path / n, model=EVEN, optim=optim, layout=layout, train=float32)
        for n in ("unbroken", "parts")
    )
    want = ranks(2).run(curve, unbroken, 4)[0]
    first = ranks(2).run(curve, parts, 2)[0]
    second = ranks(2).run(curve, parts, 2, whole.newest(parts.run.folder))[0]
    assert [first[0], first[1][:-1], *second] == want
    a, b = whole.tensors(whole.newest(unbroken.run.folder)), whole.tensors(whole.newest(parts.run.folder))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_under_another_layout_continues_the_same_run(ranks, small_corpus, tmp_path: Path) -> None:
    more = {"train": TRAIN | {"steps": 4}, "model": ODD, "optim": OPTIM}
    want = ranks(1).run(curve, config(small_corpus, tmp_path / "unbroken", **more), 4)[0]
    start = config(small_corpus, tmp_path / "start", layout={"dp": 2, "tp": 2, "ep": 2, "etp": 2}, **more)
    ranks(4).run(curve, start, 2)
    for world, layout in ((1, {}), (2, {"ep": 2}), (4, {"dp": 1, "cp": 2, "tp": 2, "ep": 4})):
        cfg = config(small_corpus, tmp_path / f"on{world}", layout=layout, **more)
        got = ranks(world).run(curve, cfg, 2, whole.newest(start.run.folder))[0]
        close(got, want[2:])
