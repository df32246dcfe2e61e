"""Recompute and the loss in chunks: the same gradients, choices and counts from less memory, under every layout."""

from collections import Counter
from functools import partial
from pathlib import Path

import livemem
import pytest
import torch
import torch.distributed as dist
from test_train import MODEL, TRAIN, close, config, curve, error, trainer
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import comm
from moetrain.config import OPTIONS, UserError, load
from moetrain.evaluate import summed_loss
from moetrain.job import Config, check
from moetrain.model import transformer
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
}  # fmt: skip


def case(corpus: Path, folder: Path, name: str, recompute: dict, **more: dict) -> Config:
    groups = dict(CASES[name]) | {"recompute": recompute} | more
    if name == "replayed":
        ids = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:2] for i in range(160)])
        save_choices(folder / "ids", {0: {layer: ids.view(8, 20, 2) for layer in (1, 2)}}, first_sample={0: 0})
        router = {"kind": "replay", "path": str(folder / "ids")}
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


@pytest.mark.parametrize("world", LAYOUTS)
def test_layouts_with_recompute_are_the_run_of_one_rank_without(ranks, small_corpus, tmp_path, want, world) -> None:
    trials = [(name, layout) for name in want for layout in LAYOUTS[world]]
    modes = list(RECOMPUTE.values())
    for i, (name, layout) in enumerate(trials):
        for j in range(2):
            recompute, sharding = modes[(2 * i + j) % len(modes)], SHARDING[(i + j) % len(SHARDING)]
            folder = tmp_path / f"{i}-{j}"
            folder.mkdir()
            cfg = case(small_corpus, folder, name, recompute, layout=layout, sharding=sharding)
            got = ranks(world).run(curve, cfg)
            assert all(g == got[0] for g in got), "ranks agree"
            close(got[0], want[name])


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
    """Of one MoE layer: the whole way to the experts and back; of attention the rows, not the results."""
    model = MODEL | {"num_layers": 1, "first_dense": 0, "qk_norm": "none"}
    found = {}
    for name, recompute in {"none": {}, "full": FULL, **RECOMPUTE}.items():
        cfg = config(
            small_corpus, tmp_path / "run", model=model, recompute=recompute | ({"layers": [0]} if "layers" in recompute else {}),
            layout={"dp": 1, "tp": 2, "ep": 2},
        )  # fmt: skip
        found[name] = ranks(2).run(collectives, cfg)[0]
    first, back = found["none"]
    assert {forward == first for forward, _ in found.values()} == {True}, "forward sends what it always does"
    again = {name: dict(backward - back) for name, (_, backward) in found.items()}
    print(first, back, again)


LONG = {
    "model": {
        "vocab_size": 512, "dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "first_dense": 0,
        "moe": {"num_experts": 4, "hidden": 64},
    },
    "train": TRAIN | {"batch": 2, "micro_batch": 2, "seq_len": 512, "dtype": "float32"},
}  # fmt: skip


def peak(rank: int, world: int, cfg: Config) -> int:
    """Bytes of activations at the peak of a step: without its gradients."""
    run = trainer(rank, world, cfg)
    run.step()
    with livemem.Peak() as watched:
        run.step()
    return watched.most


def test_less_is_alive_the_more_is_computed_again(small_corpus, tmp_path) -> None:
    found = {}
    for name, recompute in {"none": {}, **RECOMPUTE}.items():
        found[name] = peak(0, 1, config(small_corpus, tmp_path / "run", recompute=recompute | {"loss_rows": 16}, **LONG))
    print({k: round(v / 2**20, 2) for k, v in found.items()})


def test_logits_are_never_whole(small_corpus, tmp_path) -> None:
    wide = LONG | {"model": LONG["model"] | {"vocab_size": 8192, "num_layers": 1}}
    found = {}
    for rows in (0, 512, 256, 128, 64):
        cfg = config(small_corpus, tmp_path / "run", recompute=FULL | {"loss_rows": rows}, **wide)
        found[rows] = peak(0, 1, cfg)
    print({k: round(v / 2**20, 2) for k, v in found.items()})
