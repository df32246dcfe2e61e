"""Recompute and the loss in chunks: the same gradients, choices and counts from less memory, under every layout."""

import itertools
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from drawn import drawn
from test_train import MODEL, TRAIN, close, config, curve, error, trainer
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import comm
from moetrain.config import OPTIONS, UserError, load
from moetrain.evaluate import summed_loss
from moetrain.job import Config, check
from moetrain.memory.ledger import Ledger
from moetrain.model.loss import summed, summed_in_chunks
from moetrain.moe.routers import topk
from moetrain.moe.routers.replay import save_choices
from moetrain.moe.types import Context
from moetrain.train import Seen, Trainer

FULL = {"mode": "full"}
EVERY_PART = {"mode": "selective", "parts": ["norm", "attention", "moe"]}
RECOMPUTE = {
    "full": FULL,
    "full, some layers, loss in chunks": FULL | {"layers": [1], "loss_rows": 7},
    "selective": {"mode": "selective"},
    "norm": {"mode": "selective", "parts": ["norm"]},
    "attention, activation": {"mode": "selective", "parts": ["attention", "experts_activation"]},
    "moe": {"mode": "selective", "parts": ["moe"]},
    "every part": EVERY_PART,
    "loss in chunks": {"loss_rows": 13},
}
SENT = {name: recompute for name, recompute in RECOMPUTE.items() if "layers" not in recompute}
PARAMETERS = pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
CASES: dict[str, dict] = {
    "dropless": {},
    "drops, documents, tied and padded vocabulary": {
        "model": MODEL | {"tie_embeddings": True, "vocab_size": 515, "qk_norm": "full"}
        | {"moe": MODEL["moe"] | {"dispatcher": {"kind": "capacity", "factor": 1.0}}},
        "data": {"mask_documents": True, "ignore_tokens": [5, 300]},
    },
    "padded vocabulary, top-3, sigmoid": {
        "model": MODEL | {"vocab_size": 515, "num_heads": 2, "qkv_bias": True}
        | {"moe": MODEL["moe"] | {"router": {"kind": "topk", "top_k": 3, "score": "sigmoid"}}},
    },
    "replayed": {},
    "replayed in place of a router": {"inner": {"kind": "topk"}},
    "rounded": {"model": MODEL | {"moe": MODEL["moe"] | {"rounding": {"multiple": 4}}}},
}  # fmt: skip


def case(corpus: Path, folder: Path, name: str, recompute: dict, **more: dict) -> Config:
    groups = dict(CASES[name]) | {"recompute": recompute} | more
    if name.startswith("replayed"):
        ids = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:2] for i in range(160)])
        save_choices(folder / "ids", {0: {layer: ids.view(8, 20, 2) for layer in (1, 2)}}, first_sample={0: 0})
        router = {"kind": "replay", "path": str(folder / "ids"), "inner": groups.pop("inner", None)}
        groups["model"] = MODEL | {"moe": MODEL["moe"] | {"router": router}}
    if "data" in groups:
        groups["data"] = {"corpora": {"small": {"path": str(corpus)}}} | groups["data"]
    return config(corpus, folder / "run", **groups)


def outcome(run: Trainer) -> tuple[Seen, dict[str, Tensor]]:
    """What a step shows, and all of its figures by name."""
    seen = Seen()
    result = run.step(seen=seen)
    figures = {"loss": result.loss, "load": result.load_LE, "dropped": result.dropped, "balance": result.balance_J}
    figures |= {"norm": result.norm} | seen.grads
    return seen, figures


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_and_count_is_that_of_no_recompute(small_corpus, tmp_path, monkeypatch, name) -> None:
    want_seen, want = outcome(trainer(0, 1, case(small_corpus, tmp_path, name, {})))
    assert (want["dropped"] > 0) == name.startswith("drops")

    def once(scores_TE, k, right=topk.top_k):
        assert torch._C._current_graph_task_id() == -1, "a top-k may not repeat itself: backward takes the first's ids"
        return right(scores_TE, k)

    monkeypatch.setattr(topk, "top_k", once)
    for words, recompute in RECOMPUTE.items():
        seen, got = outcome(trainer(0, 1, case(small_corpus, tmp_path, name, recompute)))
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert error(got[key], value) < 1e-12, f"{words}: {key}"
        for field in ("ids", "scores"):
            for a, b in zip(getattr(seen, field), getattr(want_seen, field), strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[layer], b[layer]) for layer in a)


@PARAMETERS
def test_micro_batches_in_flight_do_not_meet(small_corpus, tmp_path, recompute) -> None:
    """As in a pipeline: several forwards, then their backwards in another order."""

    def grads(order: list[int] | None) -> dict[str, Tensor]:
        run = trainer(0, 1, config(small_corpus, tmp_path / "run", recompute=recompute))
        for layer in run.model.moe_layers():
            layer.begin_step(3)

        def forward(m: int) -> Tensor:
            batch = run.data.loader.batch(2 * m, 2)
            return summed_loss(run.model, batch, run.part, step=0, micro_batch=m, routed_tokens=160.0)

        if order is None:
            for m in range(3):
                forward(m).backward()
        else:
            losses = [forward(m) for m in range(3)]
            for m in order:
                losses[m].backward()
        return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}

    want = grads(None)
    for name, g in grads([1, 2, 0]).items():
        assert error(g, want[name]) < 1e-12, name


@pytest.mark.parametrize("option", OPTIONS["router"])
def test_every_router_weighs_its_own_choices_again(tmp_path, option) -> None:
    T, E = 20, 8
    save_choices(tmp_path / "ids", {0: {0: torch.randint(E, (1, T, 2))}}, first_sample={0: 0})
    more = {"path": str(tmp_path / "ids")} if option == "replay" else {}
    router = load({"kind": option} | more, OPTIONS["router"][option])
    logits_TE, bias_E = torch.randn(T, E), torch.randn(E)
    ctx = Context(step=0, micro_batch=0, sample_B=torch.zeros(1).long(), position_S=torch.arange(T), routed_tokens=1.0)
    first = router(logits_TE, bias_E, ctx=ctx, layer=0)
    again = router.weigh(logits_TE, router.scores(logits_TE), first.ids_TK)
    for name, value in vars(first).items():
        assert value is again.__dict__[name] or torch.equal(value, again.__dict__[name]), name


LAYOUTS = {
    2: [{"dp": 2}, {"dp": 1, "tp": 2, "ep": 2}, {"dp": 1, "cp": 2, "etp": 2}],
    4: [{"dp": 2, "tp": 2, "ep": 2, "replicate": 2}, {"dp": 1, "cp": 2, "tp": 2, "ep": 2, "etp": 2}],
}
SHARDING = [{}, {"dense": 2, "experts": 2, "accumulate": "sharded"}, {"experts": 2}, {"accumulate": "sharded"}]


@pytest.fixture(scope="module")
def want(small_corpus, tmp_path_factory):
    """Of a case: three steps of one rank, without recompute."""
    return {
        name: curve(0, 1, case(small_corpus, tmp_path_factory.mktemp("one"), name, {})) for name in list(CASES)[:2]
    }


PLACES = [(world, layout) for world, several in LAYOUTS.items() for layout in several]
TRIALS = drawn(itertools.product(PLACES, list(CASES)[:2], RECOMPUTE, SHARDING), 4, of="recompute")


@pytest.mark.parametrize(("place", "name", "mode", "sharding"), TRIALS, ids=str)
def test_layouts_with_recompute_are_the_run_of_one_rank_without(
    ranks, small_corpus, tmp_path, want, place, name, mode, sharding
) -> None:
    world, layout = place
    cfg = case(small_corpus, tmp_path, name, RECOMPUTE[mode], layout=layout, sharding=sharding)
    got = ranks(world).run(curve, cfg)
    assert all(g == got[0] for g in got), "ranks agree"
    close(got[0], want[name])


def test_a_rank_whose_rows_of_the_vocabulary_are_all_padding(ranks, small_corpus, tmp_path) -> None:
    model = MODEL | {"pad_vocab_to": 1024}
    want = curve(0, 1, config(small_corpus, tmp_path / "one", model=model))
    for tied in (False, True):
        groups = {"model": model | {"tie_embeddings": tied}, "layout": {"dp": 1, "tp": 2}}
        chunked = config(small_corpus, tmp_path / f"chunked{tied}", recompute={"loss_rows": 9}, **groups)
        got = ranks(2).run(curve, chunked)[0]
        close(got, ranks(2).run(curve, config(small_corpus, tmp_path / f"whole{tied}", **groups))[0] if tied else want)


def collectives(rank: int, world: int, cfg: Config) -> tuple[Counter, Counter]:
    """How often each collective is called in a micro-batch's forward, and in its backward."""
    run = trainer(rank, world, cfg)
    counts = Counter()

    def counted(name: str, right, *args, **kwargs):
        counts[name] += 1
        return right(*args, **kwargs)

    patched = {
        (dist, "all_to_all_single"): "all_to_all", (dist, "all_reduce"): "all_reduce",
        (comm, "_gathered"): "gather", (comm, "_scattered_sum"): "scatter",
    }  # fmt: skip
    rights = {at: getattr(*at) for at in patched}
    for at, name in patched.items():
        setattr(*at, partial(counted, name, rights[at]))
    try:
        batch = run.data.loader.batch(0, 2)
        loss = summed_loss(run.model, batch, run.part, step=0, micro_batch=0, routed_tokens=160.0)
        forward = Counter(counts)
        loss.backward()
    finally:
        for at, right in rights.items():
            setattr(*at, right)
    return forward, counts - forward


def test_what_is_sent_again(ranks, small_corpus, tmp_path) -> None:
    """Of one MoE layer: the whole way to the experts and back; of attention the rows, not the results; of a gated
    shared expert both."""
    model = MODEL | {"num_layers": 1, "first_dense": 0, "qk_norm": "none"}
    found = {}
    for name, recompute in {"none": {}, "all parts, loss in chunks": EVERY_PART | {"loss_rows": 5}, **SENT}.items():
        cfg = config(
            small_corpus, tmp_path / "run", model=model, recompute=recompute, layout={"dp": 1, "tp": 2, "ep": 2},
        )  # fmt: skip
        found[name] = ranks(2).run(collectives, cfg)[0]
    first, back = found["none"]
    assert {forward == first for forward, _ in found.values()} == {True}, "forward sends what it always does"
    again = {name: dict(backward - back) for name, (_, backward) in found.items()}
    assert again.pop("none") == {}
    experts = Counter(all_to_all=4, all_reduce=2, gather=1, scatter=1)
    assert again.pop("all parts, loss in chunks") == experts + Counter(gather=1)
    assert again == {
        "full": experts + Counter(gather=1, scatter=1),
        "selective": Counter(gather=1), "norm": Counter(gather=1), "attention, activation": Counter(gather=1),
        "moe": experts, "every part": experts + Counter(gather=1), "loss in chunks": {},
    }  # fmt: skip


UNSHARD = "foreach_all_gather"


def all_gathers(rank: int, world: int, cfg: Config) -> int:
    """Of FSDP2's units in a step."""
    run, calls, right = trainer(rank, world, cfg), [], getattr(_fsdp_param_group, UNSHARD)

    def counted(*args):
        calls.append(args)
        return right(*args)

    setattr(_fsdp_param_group, UNSHARD, counted)
    try:
        run.step()
    finally:
        setattr(_fsdp_param_group, UNSHARD, right)
    return len(calls)


def test_weights_are_gathered_as_often_as_without_recompute(ranks, small_corpus, tmp_path) -> None:
    """A unit of experts that a block runs again stays gathered for its backward."""
    found = {}
    for name, recompute in {"none": {}, "full": FULL, "every part": EVERY_PART}.items():
        cfg = config(small_corpus, tmp_path / "run", recompute=recompute, layout={"dp": 2})
        found[name] = ranks(2).run(all_gathers, cfg)[0]
    assert found["full"] == found["every part"] == found["none"] > 0


LONG = {
    "model": {
        "vocab_size": 512, "dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "first_dense": 0,
        "moe": {"num_experts": 4, "hidden": 64},
    },
    "train": TRAIN | {"batch": 2, "micro_batch": 2, "seq_len": 512, "dtype": "float32"},
}  # fmt: skip


def peak(rank: int, world: int, cfg: Config) -> int:
    """Bytes that a step has made, at its peak."""
    run = trainer(rank, world, cfg)
    run.step()
    with Ledger() as ledger:
        run.step()
    return ledger.peak().total


def test_less_is_alive_the_more_is_computed_again(small_corpus, tmp_path) -> None:
    found = {}
    for name, recompute in {"none": {}, **RECOMPUTE}.items():
        found[name] = peak(0, 1, config(small_corpus, tmp_path / "run", recompute=recompute | {"loss_rows": 16}, **LONG))
    rest = found["full"]
    assert rest < 0.5 * found["none"], found
    assert rest < found["selective"] < 0.9 * found["none"], found
    assert found["selective"] < found["norm"] < found["none"], found
    assert found["every part"] < found["moe"] < 0.75 * found["none"], found
    assert found["full"] < found["full, some layers, loss in chunks"] < found["none"], found


def test_logits_are_never_whole(small_corpus, tmp_path) -> None:
    wide = LONG | {"model": LONG["model"] | {"vocab_size": 8192, "num_layers": 1}}
    found = {}
    for rows in (0, 512, 256, 64):
        cfg = config(small_corpus, tmp_path / "run", recompute=FULL | {"loss_rows": rows}, **wide)
        found[rows] = peak(0, 1, cfg)
    logits = 1024 * 8192 * 4
    assert logits < found[0] < 1.3 * logits, "their gradient takes their place"
    assert found[512] - found[256] == pytest.approx(256 * 8192 * 4, rel=0.01), "one chunk and nothing more"
    assert found[64] < 0.4 * logits


def inputs(dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BSD, weight_VD = torch.randn(3, 50, 64, generator=generator), torch.randn(616, 64, generator=generator) * 0.3
    targets_BS = torch.randint(600, (3, 50), generator=generator)
    targets_BS[1, :7] = -100
    return x_BSD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_BS


def in_chunks(x: Tensor, weight: Tensor, targets: Tensor, step: int) -> list[Tensor]:
    loss = summed_in_chunks(x, weight, targets, real_rows=600, first_row=0, group=None, step=step)
    (loss * 0.01).backward()
    return [loss.detach(), x.grad, weight.grad]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_a_chunked_loss_is_exact_and_in_bfloat16_no_worse_than_a_whole_one(step) -> None:
    x, weight, targets = inputs(torch.float64)
    loss = summed(x @ weight[:600].t(), targets)
    (loss * 0.01).backward()
    want = [loss.detach(), x.grad, weight.grad]
    for a, b in zip(in_chunks(*inputs(torch.float64), step), want, strict=True):
        assert error(a, b) < 1e-13  # pyright: ignore[reportArgumentType]
    (x, weight, targets), (x64, weight64, _) = inputs(torch.bfloat16), inputs(torch.bfloat16)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x64, weight64))
    want = in_chunks(x64, weight64, targets, step)
    whole = summed(x @ weight[:600].t(), targets)
    (whole * 0.01).backward()
    chunked = in_chunks(*inputs(torch.bfloat16), step)
    for a, b, c in zip(chunked, [whole.detach(), x.grad, weight.grad], want, strict=True):
        assert error(a, c) < max(1.1 * error(b, c), 1e-5)  # pyright: ignore[reportArgumentType]
    assert chunked[1].dtype == chunked[2].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mode": "selective", "parts": ["norm", "mlp"]}, r"recompute\.parts\[1\]='mlp' is not one of norm, attention"),
        ({"mode": "selective", "parts": []}, r"parts=\[\] .* recomputes nothing: name some of norm"),
        ({"mode": "full", "parts": ["norm"]}, r"parts=\[norm\] with recompute\.mode=full: only selective has parts"),
        ({"mode": "selective", "parts": ["moe", "experts_activation"]}, r"leave out experts_activation"),
        ({"layers": [1]}, r"layers=\[1\] with recompute\.mode=none"),
        (FULL | {"layers": []}, r"layers=\[\] is no layer"),
        (FULL | {"layers": [0, 3]}, r"layers=\[0, 3\]: 3 is not a layer of model\.num_layers=3, use 0 to 2"),
        ({"loss_rows": -1}, r"loss_rows=-1: use 0"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(tmp_path, keys, said) -> None:
    with pytest.raises(UserError, match=said):
        check(config(tmp_path, tmp_path, recompute=keys), world=1)
