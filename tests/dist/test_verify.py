"""Verification end to end: layouts beside one rank, near-ties, bfloat16, and ranks that fail, hang or die."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rankpool import RankPool

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.config import load, replace
from moetrain.job import Config, DType
from moetrain.layouts import Layout
from moetrain.moe.routers import topk
from moetrain.verify import choices
from moetrain.verify.outcome import Outcome, record
from moetrain.verify.ranks import Job, LocalRanks, Ranks, perform
from moetrain.verify.report import cause, conclusion, line, table
from moetrain.verify.session import FailedError, Verdict, make_reference, verify
from moetrain.verify.tokens import Synthetic, synthetic
from moetrain.world import World

BALANCE = {"switch": {"kind": "switch", "coef": 0.05}, "expert_bias": {"kind": "expert_bias", "rate": 0.01}}
MODEL = {
    "vocab_size": 100, "dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "init_std": 0.1,
    "moe": {"num_experts": 4, "hidden": 8, "shared_hidden": 8, "balance": BALANCE},
}  # fmt: skip
TRAIN = {"steps": 1, "batch": 8, "micro_batch": 2, "seq_len": 12, "dtype": "float64", "device": "cpu", "threads": 1}
DATA = {"mask_documents": True, "ignore_tokens": [5, 300]}
HERE = torch.device("cpu")


def config(dtype: str = "float64", **keys) -> Config:
    model = MODEL | keys
    return load(
        {"seed": 3, "model": model, "train": TRAIN | {"dtype": dtype}, "optim": {"warmup": 0}, "data": DATA}, Config
    )


class Pool(Ranks):
    """The ranks of the tests' pool. ``shake``: how far scores are moved before a layout chooses."""

    def __init__(self, pool: RankPool, shake: float = 0.0) -> None:
        self.pool, self.size, self.shake = pool, pool.world, shake

    def run(self, job: Job) -> str | None:
        try:
            self.pool.run(one, job.encode(), self.shake)
        except AssertionError as e:
            return str(e).strip().splitlines()[-1]

    def lead(self, decide: Callable):
        return decide()

    def close(self) -> None: ...


def one(rank: int, size: int, job: str, shake: float) -> None:
    world = World(rank, size, rank, size, HERE, "gloo" if size > 1 else "", dist.group.WORLD if size > 1 else None)
    wanted, honest = Job.decode(job), topk.top_k

    def shaken(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
        return honest(scores_TE + shake * torch.arange(scores_TE.shape[1]), k)

    topk.top_k = honest if wanted.alone else shaken
    try:
        perform(wanted, world, None)
    finally:
        topk.top_k = honest


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_layouts_are_the_run_of_one_rank(ranks, tmp_path, dtype) -> None:
    pool = Pool(ranks(2))
    reference = make_reference(config(dtype), pool, tmp_path / "reference")
    for n, layout in enumerate((Layout(dp=2), Layout(dp=2, ep=2), Layout(dp=1, tp=2, etp=2), Layout(dp=1, cp=2, ep=2))):
        verdict = verify(layout, reference, pool, tmp_path / str(n))
        assert verdict.report is not None, verdict.error
        assert verdict.kind == "same", (layout, table(verdict.report))
        assert verdict.report.worst > 0, "different roundings, or nothing was compared"
        quantities = {row.quantity for row in verdict.report.rows}
        assert {"loss", "grad norm", "balance switch", "expert load", "gradients", "expert bias"} <= quantities


def test_any_layout_is_a_reference_too(ranks, tmp_path) -> None:
    pool = Pool(ranks(2))
    reference = make_reference(config(), pool, tmp_path / "reference", layout=Layout(dp=2))
    assert verify(Layout(dp=2, ep=2), reference, pool, tmp_path / "layout").kind == "same"


def test_near_ties_are_counted_and_replayed(ranks, tmp_path) -> None:
    moe = MODEL["moe"] | {"balance": {}}
    flat = config("float32", init_std=1e-4, moe=moe)  # all scores are almost the same
    pool = Pool(ranks(2), shake=2e-6)
    reference = make_reference(flat, pool, tmp_path / "reference")
    verdict = verify(Layout(dp=2), reference, pool, tmp_path / "layout")
    free = choices.compare(Outcome(tmp_path / "layout"), Outcome(reference.folder), replayed=False)
    assert verdict.report is not None, verdict.error
    assert verdict.kind == "same", table(verdict.report)
    again, wanted = Outcome(tmp_path / "layout" / "replayed"), Outcome(reference.folder)
    both = [(again.choices(layer)[0].sort(-1).values, wanted.choices(layer)[0].sort(-1).values) for layer in (0, 1)]
    others = [int((own != theirs).any(-1).sum()) for own, theirs in both]
    assert free.near_ties == others[0] > 0, "only the first layer can be judged before choices are replayed"
    assert verdict.report.choices.near_ties == sum(others)
    assert "near-ties replayed" in line(verdict)


def test_a_choice_at_a_wide_gap_is_a_difference(ranks, tmp_path) -> None:
    pool = Pool(ranks(2), shake=0.1)
    reference = make_reference(config(), pool, tmp_path / "reference")
    verdict = verify(Layout(dp=2), reference, pool, tmp_path / "layout")
    assert verdict.kind == "different"
    assert verdict.report is not None
    assert cause(verdict.report).startswith("choices of expert, first layer 0, sample ")


def test_a_planted_fault_is_found_in_the_layout_only(ranks, tmp_path) -> None:
    pool = Pool(ranks(2))
    reference = make_reference(config(), pool, tmp_path / "reference")
    verdict = verify(Layout(dp=2), reference, pool, tmp_path / "layout", fault="double_division")
    assert conclusion(verdict).startswith("DIFFERENT: first embedding")
    assert "summed over dp*cp" in conclusion(verdict)
    assert verify(Layout(dp=2), reference, pool, tmp_path / "layout").kind == "same", "and gone with its job"


def test_a_layout_that_the_model_refuses_is_a_gap(ranks, tmp_path) -> None:
    pool = Pool(ranks(2))
    reference = make_reference(config(), pool, tmp_path / "reference")
    odd = replace(reference, cfg=replace(reference.cfg, train=replace(reference.cfg.train, batch=6)))
    verdict = verify(Layout(dp=2), odd, pool, tmp_path / "layout")
    assert verdict == Verdict(Layout(dp=2), "gap", error=verdict.error)
    assert "train.batch=6 is not a multiple" in verdict.error


def children(ranks: LocalRanks) -> list[int]:
    keeper = ranks._keeper.pid  # pyright: ignore[reportOptionalMemberAccess]
    return [int(pid) for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks by /proc")
def test_ranks_that_die_hang_or_fail_are_named_and_the_rest_goes_on(tmp_path) -> None:
    with LocalRanks(2, folder=tmp_path / "ranks", timeout=120) as local:
        reference = make_reference(config(), local, tmp_path / "reference")
        assert verify(Layout(dp=2), reference, local, tmp_path / "0").kind == "same"

        os.kill(children(local)[1], signal.SIGKILL)
        verdict = verify(Layout(dp=2), reference, local, tmp_path / "1")
        assert conclusion(verdict) == "FAILED: rank 1 died (signal 9)"
        assert verify(Layout(dp=2, ep=2), reference, local, tmp_path / "2").kind == "same"

        os.kill(children(local)[1], signal.SIGSTOP)
        local.timeout = 4
        verdict = verify(Layout(dp=2), reference, local, tmp_path / "3")
        assert conclusion(verdict).startswith("FAILED: not done after 4 s: ranks 0, 1 in moetrain/")
        local.timeout = 120

        (tmp_path / "4").write_text("a file where a folder should be")
        error = local.run(Job(replace(reference.cfg, layout=Layout(dp=2)), tmp_path / "4" / "x"))
        assert error is not None
        assert error.startswith("rank 0: NotADirectoryError") or error.startswith("rank 1: NotADirectoryError")
        assert verify(Layout(dp=2), reference, local, tmp_path / "5").kind == "same"
        keeper, alive = local._keeper, children(local)
    assert keeper is not None
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in alive) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in alive), "ranks end with their keeper"


def test_a_reference_that_fails_ends_it(ranks, tmp_path, monkeypatch) -> None:
    pool = Pool(ranks(2))
    monkeypatch.setattr(pool, "run", lambda job: "rank 0: no memory")
    with pytest.raises(FailedError, match="the reference could not be run: rank 0: no memory"):
        make_reference(config(), pool, tmp_path)


def test_samples_do_not_depend_on_who_makes_them() -> None:
    data = synthetic(config()).loader
    whole = data.batch(0, 8)
    parts = [data.batch(first, 2) for first in (0, 2, 4, 6)]
    assert torch.equal(whole.tokens_BS, torch.cat([p.tokens_BS for p in parts]))
    assert torch.equal(whole.targets_BS, torch.cat([p.targets_BS for p in parts]))
    counted_B = (whole.targets_BS >= 0).sum(1)
    assert counted_B.unique().numel() > 2, "rows differ in what a divisor counts"
    assert data.num_targets(0, 8) == counted_B.sum() < 8 * 12
    assert whole.documents_BS is not None
    assert whole.documents_BS.max() > 0
    assert whole.tokens_BS.max() < 100, "an ignored id above the vocabulary stands for one inside it"


def test_samples_are_skewed_like_words() -> None:
    cfg = config()
    plain = replace(cfg.data, mask_documents=False, ignore_tokens=[])
    loader = Synthetic(plain, seq_len=255, vocab_size=1000, seed=0)
    count_V = loader.batch(0, 64).tokens_BS.flatten().bincount(minlength=1000)
    assert count_V[0] > 1.5 * count_V[1] > 2 * count_V[3] > 0
    assert loader.num_targets(0, 64) == 64 * 255
    assert loader.fingerprint != Synthetic(plain, seq_len=255, vocab_size=1000, seed=1).fingerprint


def test_an_outcome_says_whose_it_is(tmp_path) -> None:
    cfg = replace(config(), train=replace(config().train, dtype=DType.float32))
    record(cfg, World(0, 1, 0, 1, HERE, ""), tmp_path, like=None)
    found = Outcome(tmp_path)
    assert (found.meta["dtype"], found.meta["samples"], found.layers) == ("float32", 8, [0, 1])
    assert found.parameters[0] == "embedding.weight"
    assert found.parameters[-1] == "head.weight"
    assert all(f"grad.{n}" in found.index and f"weight.{n}" in found.index for n in found.parameters)
