"""Weights kept in bfloat16: the same update under every layout, gradients that stay wide, resumes, conversions."""

from pathlib import Path

import pytest
import torch
import whole
from drawn import drawn
from test_train import MODEL, TRAIN, config, curve, error, trainer
from torch import Tensor

from moetrain import counter
from moetrain.config import UserError, replace
from moetrain.job import Config
from moetrain.parallel import state
from moetrain.resume import start_from

BF16 = TRAIN | {"dtype": "bfloat16"}
OPTIM = {"lr": 1e-2, "warmup": 2, "clip": 0.5, "weight_dtype": "bfloat16", "state_dtype": "bfloat16"}
ODD = MODEL | {
    "num_layers": 2, "dim": 18, "num_heads": 4, "num_kv_heads": 1, "head_dim": 6, "dense_hidden": 7, "qk_norm": "full",
    "moe": MODEL["moe"] | {"num_experts": 12, "hidden": 5, "shared_hidden": 3},
}  # fmt: skip
FSSDP = MODEL | {"moe": MODEL["moe"] | {"placement": {"kind": "fssdp", "reshard_every": 2}}}
MODELS = {"even": MODEL, "nothing divides evenly": ODD, "experts travel": FSSDP}
LAYOUTS = [
    (2, {"dp": 2, "ep": 2}),
    (2, {"dp": 1, "tp": 2, "etp": 2}),
    (4, {"dp": 4, "replicate": 2}),
    (4, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}),
    (4, {"dp": 1, "pp": 2, "cp": 2, "ep": 2}),
]


def drawn_gradients(rank: int, world: int, cfg: Config, steps: int) -> Path:
    """Updates by gradients that are a hash of name and element, whatever the layout; saved."""
    run = trainer(rank, world, cfg)
    for step in range(steps):
        grads = {}
        for name, p in run.model.named_parameters():
            grads[name] = torch.zeros(state.local(p).shape)
            logical = run.describe(name, grads[name])
            for chunk in logical.chunks:
                counter.fill_normal_(
                    chunk.tensor, shape=logical.shape, offsets=chunk.offsets, key=counter.key(step, name), std=0.1
                )
        run.optimizer.step(grads, lr=1e-2, scale=torch.tensor(0.7), step=step)
        run.steps += 1
    return run.save()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("world", "layout", "model"), drawn([(w, n, m) for w, n in LAYOUTS for m in MODELS], 4, of="bf16 weights"), ids=str
)
def test_equal_gradients_give_equal_bits(ranks, small_corpus, tmp_path, world, layout, model, kind) -> None:
    """Muon's matrices are put together from pieces: their update is equal to its last bits only."""
    cfg = config(small_corpus, tmp_path / "one", model=MODELS[model], train=BF16, optim=OPTIM | {"kind": kind})
    want = whole.tensors(ranks(1).run(drawn_gradients, cfg, 3)[0])
    cfg = config(
        small_corpus, tmp_path / "many", model=MODELS[model], train=BF16, optim=OPTIM | {"kind": kind}, layout=layout
    )
    got = whole.tensors(ranks(world).run(drawn_gradients, cfg, 3)[0])
    names = [n for n in want if n.startswith(("model.", "optim."))]
    assert all(want[n].dtype is torch.bfloat16 for n in names if "bias_E" not in n)
    for name in names:
        if kind == "muon" and f"optim.momentum.{name.partition('.')[2]}" in want:
            assert (got[name] != want[name]).double().mean() < 1e-2, name
        else:
            assert torch.equal(got[name], want[name]), name


def wide(rank: int, world: int, cfg: Config) -> tuple[set[str], set[str], dict[str, Tensor]]:
    """Dtypes of weights and of gradients, and the gradients of all micro-batches on this rank."""
    run = trainer(rank, world, cfg)
    run.gradients()
    grads = state.grads(run.model)
    return {str(p.dtype) for p in run.model.parameters()}, {str(g.dtype) for g in grads.values()}, grads


@pytest.mark.parametrize(("world", "layout"), [(1, {}), *LAYOUTS], ids=str)
@pytest.mark.parametrize("accumulate", ["local", "sharded"])
def test_gradients_stay_float32(ranks, small_corpus, tmp_path, world, layout, accumulate) -> None:
    """And are bit for bit those of masters in float32, which FSDP2 rounds before it gathers them, and others as they
    are used: but for an embedding that is not sharded, whose float32 sum is rounded once a micro-batch, as a shard's is.
    """
    model = FSSDP if layout.get("ep") else MODEL
    groups = {"model": model, "layout": layout, "train": BF16 | {"batch": 16}, "sharding": {"accumulate": accumulate}}
    cfg = config(small_corpus, tmp_path / "narrow", optim=OPTIM, **groups)
    found = ranks(world).run(wide, cfg)
    assert all(weights == {"torch.bfloat16"} and grads == {"torch.float32"} for weights, grads, _ in found)
    masters = replace(cfg, optim=replace(cfg.optim, weight_dtype=None))
    for (_, _, got), (_, _, want) in zip(found, ranks(world).run(wide, masters), strict=True):
        assert got.keys() == want.keys()
        sharded = layout.get("dp", 1) * layout.get("cp", 1) > 1
        other = [name for name in want if not torch.equal(got[name], want[name])]
        assert other == [] if sharded else other in ([], ["embedding.weight"])
        for name in other:
            assert error(got[name], want[name]) < 2**-8
        assert any((g.bfloat16().float() != g).any() for g in got.values()), "sums of micro-batches are wider than bf16"


@pytest.mark.parametrize(("kind", "schedule"), [("adamw", "zbv"), ("muon", "1f1b")])
def test_a_pipeline_has_the_bits_of_one_rank(ranks, small_corpus, tmp_path, kind, schedule) -> None:
    """Weight gradients that are put off too."""
    saved, curves = [], []
    groups = {"model": MODEL | {"num_layers": 4}, "train": BF16, "pipeline": {"schedule": schedule}}
    for world, layout in ((1, {}), (2, {"dp": 1, "pp": 2})):
        cfg = config(small_corpus, tmp_path / str(world), optim=OPTIM | {"kind": kind}, layout=layout, **groups)
        curves.append(ranks(world).run(curve, cfg)[0])
        saved.append(whole.tensors(whole.newest(cfg.run.folder)))
    assert curves[0][0][0] == curves[1][0][0]
    for name, tensor in saved[0].items():
        assert torch.equal(saved[1][name], tensor), name


@pytest.mark.parametrize(
    ("world", "layout", "model"), [(1, {}, "even"), (2, {"dp": 2, "ep": 2}, "experts travel")], ids=str
)
def test_resume_is_bit_exact(ranks, small_corpus, tmp_path, world, layout, model) -> None:
    unbroken, parts = (
        config(small_corpus, tmp_path / n, model=MODELS[model], train=BF16 | {"steps": 4}, optim=OPTIM, layout=layout)
        for n in ("unbroken", "parts")
    )
    want = ranks(world).run(curve, unbroken, 4)[0]
    first = ranks(world).run(curve, parts, 2)[0]
    second = ranks(world).run(curve, parts, 2, whole.newest(parts.run.folder))[0]
    assert [first[0], first[1][: len(want[1])], *second] == want
    a, b = (whole.tensors(whole.newest(cfg.run.folder)) for cfg in (unbroken, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def reload(rank: int, world: int, cfg: Config, folder: Path) -> Path | str:
    """What a run that begins from ``folder`` has then, saved; or why it does not."""
    run = trainer(rank, world, cfg)
    try:
        run.load(start_from(cfg, folder))
    except UserError as e:
        return str(e)
    return run.save()


def test_weights_are_widened_exactly_and_rounded_to_nearest_where_that_is_allowed(
    ranks, small_corpus, tmp_path
) -> None:
    """Averages go on as they are: what they are kept in is a choice of its own. A warm start converts unasked."""
    masters = {"weight_dtype": None, "state_dtype": None}
    source = config(small_corpus, tmp_path / "source", train=BF16, optim=OPTIM | masters)
    ranks(1).run(curve, source, 2)
    saved = {"float32": whole.newest(source.run.folder)}
    want = whole.tensors(saved["float32"])

    def begun(kept: str, dtype: str | None, **run: object) -> dict[str, Tensor] | str:
        name = f"{len(list(tmp_path.iterdir()))}"
        cfg = config(
            small_corpus, tmp_path / name, train=BF16, layout={"dp": 2, "ep": 2},
            optim=OPTIM | {"state_dtype": None, "weight_dtype": dtype}, run={"dir": str(tmp_path), "name": name} | run,
        )  # fmt: skip
        found = ranks(2).run(reload, cfg, saved[kept])[0]
        if isinstance(found, str):
            return found
        saved[name] = found
        return whole.tensors(found)

    said = begun("float32", "bfloat16", fork="source")
    assert "optim.weight_dtype was null, is bfloat16" in said
    assert "'run.allow=[optim.weight_dtype]'" in said
    allow = {"fork": "source", "allow": ["optim.weight_dtype"]}
    for more in (allow, {"warm_start": "source"}):
        narrow = begun("float32", "bfloat16", **more)
        assert isinstance(narrow, dict)
        for name, x in want.items():
            weight = name.startswith("model.") and "_E" not in name
            expected = x.bfloat16() if weight else x
            if weight or "fork" in more:
                assert narrow[name].dtype == expected.dtype, name
                assert torch.equal(narrow[name], expected), name
    back = begun(list(saved)[1], None, **allow)
    assert isinstance(back, dict)
    for name, x in want.items():
        assert back[name].dtype == x.dtype, name
        assert torch.equal(back[name], x.bfloat16().float() if name.startswith("model.") and "_E" not in name else x)
