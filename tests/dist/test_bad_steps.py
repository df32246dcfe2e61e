"""Steps that are bad change nothing; after some in a row the run goes back and on without their samples; what computes or
keeps something wrong is named."""

import json
import logging
import math
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import whole
from test_train import MODEL, TRAIN, config, trainer

from moetrain import checkpoint
from moetrain.job import Config
from moetrain.model.transformer import Transformer
from moetrain.moe.layer import MoE
from moetrain.run import FailedError, run
from moetrain.train import CorruptionError, Trainer
from moetrain.world import World

SMALL = MODEL | {"num_layers": 2, "moe": MODEL["moe"] | {"balance": {
    "expert_bias": {"kind": "expert_bias", "rate": 0.01},
    "switch": {"kind": "switch", "coef": 0.05, "scope": "global_lagged"},
}}}  # fmt: skip
LAYOUTS = {1: {}, 2: {"dp": 2, "ep": 2}, 4: {"pp": 2, "dp": 2, "ep": 2}}


def cfg(corpus: Path, folder: Path, world: int, **groups: dict) -> Config:
    train = TRAIN | {"steps": 6, "micro_batch": 2} | groups.pop("train", {})
    saves = {"every": 2, "keep": 0} | groups.pop("checkpoint", {})
    model = SMALL | groups.pop("model", {})
    return config(
        corpus, folder, model=model, train=train, checkpoint=saves, logging={"every": 1}, layout=LAYOUTS[world], **groups
    )


def here(rank: int, world: int) -> World:
    group = dist.group.WORLD if world > 1 else None
    return World(rank, world, rank, world, torch.device("cpu"), "gloo" if world > 1 else "", group)


def poison(bad: range, times: float = math.nan):
    """The model's output of a micro-batch with one of these samples is multiplied; undone by what it returns."""
    right = Transformer.forward

    def wrong(self, x, ctx, targets_BS=None, **rest):
        out = right(self, x, ctx, targets_BS, **rest)
        hit = isinstance(out, torch.Tensor) and any(int(i) in bad for i in ctx.sample_B) and ctx.training
        return out * times if hit else out

    Transformer.forward = wrong
    return lambda: setattr(Transformer, "forward", right)


def life(rank: int, world: int, cfg: Config, bad: range, times: float = math.nan) -> str:
    """What a life logged on this rank, with the error that ended it."""
    undo = poison(bad, times)
    try:
        run(cfg, here(rank, world))
    except FailedError:
        pass
    finally:
        undo()
    return (cfg.run.folder / "logs" / f"rank-{rank}.log").read_text()


def straight(rank: int, world: int, cfg: Config, skipped: list[list[int]], unmoved: list[int]) -> None:
    """Without poison: the ``unmoved`` steps do not happen, ``skipped`` samples are not there; then it saves."""
    run = trainer(rank, world, cfg)
    run.skipped[:] = skipped
    for step in range(cfg.train.steps):
        if step + 1 in unmoved:
            run.steps, run.consumed = run.steps + 1, run.consumed + cfg.train.batch
        else:
            run.step()
    run.save()


def same(a: Path, b: Path) -> None:
    x, y = whole.tensors(whole.newest(a)), whole.tensors(whole.newest(b))
    assert x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []


@pytest.fixture
def corpus(small_corpus) -> Path:
    logging.getLogger("moetrain").handlers.clear()
    return small_corpus


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_bad_step_changes_nothing(ranks, corpus, tmp_path, world) -> None:
    """Step 3 has samples 16 to 23, of which 21 is poisoned: on the last rank of dp, its last but one micro-batch."""
    pool = ranks(world)
    for said in pool.run(life, cfg(corpus, tmp_path / "poisoned", world), range(21, 22)):
        assert "step 3 is bad and skipped: loss nan, gradient norm nan" in said
        assert "step 4 is bad" not in said
        m, rank = (2, world - 1) if world == 1 else (0, world - 1)
        assert f"micro-batch {m} (samples 20 to 21) on rank {rank}\n" in said
    pool.run(straight, cfg(corpus, tmp_path / "straight", world), [], [3])
    same(tmp_path / "poisoned", tmp_path / "straight")
    assert checkpoint.read_meta(whole.newest(tmp_path / "poisoned"))["updates"] == 5
    records = [json.loads(x) for x in (tmp_path / "poisoned" / "metrics.jsonl").read_text().splitlines()]
    third = next(r for r in records if r["step"] == 3)
    assert (third["loss"], third["grad_norm"], third["skipped"]) == (None, None, True)
    assert "summary.txt" in {p.name for p in (tmp_path / "poisoned").iterdir()}


@pytest.mark.parametrize("world", [2, 4])
def test_after_some_in_a_row_it_goes_back_and_on_without_their_samples(ranks, corpus, tmp_path, world) -> None:
    """Steps 4 and 5 are bad: back to step 2, whose checkpoint is older than them; step 4's is set aside."""
    pool, folder = ranks(world), tmp_path / "poisoned"
    said = pool.run(life, cfg(corpus, folder, world, bad_steps={"rewind_after": 2}), range(24, 40))[0]
    assert "step-00000004 is newer than where this life begins" in said
    assert "steps 4 to 5 are bad" in said
    assert "back to step 2, on without the samples of the bad steps (16)" in said
    pool.run(straight, cfg(corpus, tmp_path / "straight", world), [[24, 40]], [])
    same(folder, tmp_path / "straight")
    meta = checkpoint.read_meta(whole.newest(folder))
    assert (meta["step"], meta["consumed"], meta["skipped"]) == (6, 48, [[24, 40]])
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert not any("skipped" in r for r in records)


def test_it_gives_up_where_going_back_does_not_help(ranks, corpus, tmp_path) -> None:
    twice = {"rewind_after": 2, "rewinds": 1, "replays": 0}
    said = ranks(1).run(life, cfg(corpus, tmp_path / "all", 1, bad_steps=twice), range(24, 10**6))[0]
    assert "given up after 1 times back to a checkpoint (bad_steps.rewinds)" in said
    assert not (tmp_path / "all" / "bad-steps").exists()
    said = ranks(1).run(life, cfg(corpus, tmp_path / "first", 1, bad_steps=twice), range(10**6))[0]
    assert "steps 1 to 2 are bad, the last with loss nan, gradient norm nan" in said
    assert "no checkpoint of the run is there to go back to" in said
    never = {"skip": False}
    said = ranks(1).run(life, cfg(corpus, tmp_path / "never", 1, bad_steps=never), range(24, 25))[0]
    assert "step 4: loss nan, gradient norm nan: not finite" in said


def test_a_spike_is_skipped_and_a_life_knows_what_the_one_before_saw(ranks, corpus, tmp_path) -> None:
    """Ten times the loss of step 5: far above the four before it, two of which an earlier life has seen."""
    spikes = {"loss_spike": 6.0, "norm_spike": 6.0, "window": 6}
    folder, pool = tmp_path / "poisoned", ranks(2)
    pool.run(life, cfg(corpus, folder, 2, bad_steps=spikes, train={"exit_after": 2}), range(0))
    said = pool.run(life, cfg(corpus, folder, 2, bad_steps=spikes), range(32, 40), 10.0)[0]
    assert said.count("is bad and skipped") == 1
    assert "step 5 is bad and skipped: loss 6" in said
    assert "(limit 6." in said
    assert "step 5 run again: all of it is finite" in said
    pool.run(straight, cfg(corpus, tmp_path / "straight", 2), [], [5])
    same(folder, tmp_path / "straight")


def flipping(rank: int, world: int, cfg: Config, layer: str) -> str:
    """On rank 1, the second time that a MoE layer is computed, one bit of what it puts out is another."""
    run = trainer(rank, world, cfg)
    run.step()
    right, calls = MoE.forward, [0]

    def wrong(self, x, carry, ctx, **more):
        y, carry = right(self, x, carry, ctx, **more)
        calls[0] += str(self.layer) == layer
        if rank == 1 and str(self.layer) == layer and calls[0] == 3:
            y = y.clone()
            y.view(torch.int64).view(-1)[5] ^= 1
        return y, carry

    MoE.forward = wrong
    try:
        run.step(replay=True)
    except CorruptionError as error:
        return str(error)
    finally:
        MoE.forward = right
    return ""


@pytest.mark.parametrize("placement", ["static", "fssdp"])
def test_a_step_run_twice_names_the_rank_that_computes_something_else(ranks, corpus, tmp_path, placement) -> None:
    moe = SMALL["moe"] | {"placement": {"kind": placement}}
    four = cfg(corpus, tmp_path / "run", 2, model={"moe": moe}, train={"batch": 8})
    for said in ranks(2).run(flipping, four, "1"):
        assert "step 2, run twice, has not the same bits: first in blocks.1.moe (forward), micro-batch 0" in said
        assert "(samples 12 to 13) on rank 1: a fault of that machine" in said
    assert ranks(2).run(flipping, four, "none") == ["", ""]


def keeping(rank: int, world: int, cfg: Config, wrong: int) -> str:
    run = trainer(rank, world, cfg)
    run.step()
    run.check_copies()
    if rank == wrong:
        run.model.get_parameter("blocks.1.attention_norm.weight").data.view(torch.int32)[3] ^= 1
    try:
        run.check_copies()
    except CorruptionError as error:
        return str(error)
    return ""


def test_copies_that_differ_are_named(ranks, corpus, tmp_path) -> None:
    layout = {"layout": {"tp": 4, "ep": 4, "dp": 1}}
    of_four = config(corpus, tmp_path / "run", model=SMALL, train=TRAIN | {"dtype": "float32"}, **layout)
    for said in ranks(4).run(keeping, of_four, 2):
        assert said == (
            "after step 1 copies differ: model.blocks.1.attention_norm.weight on rank 2: not what 3 others have"
        )
    assert ranks(4).run(keeping, of_four, 9) == [""] * 4


def slow(rank: int, world: int, cfg: Config) -> str:
    right = Trainer.forward

    def wrong(self, *args, **more):
        time.sleep(0.3 * (rank == 1))
        return right(self, *args, **more)

    Trainer.forward = wrong
    try:
        run(cfg, here(rank, world))
    finally:
        Trainer.forward = right
    return (cfg.run.folder / "logs" / f"rank-{rank}.log").read_text()


def test_the_slowest_rank_is_named(ranks, corpus, tmp_path) -> None:
    said = ranks(4).run(slow, cfg(corpus, tmp_path / "run", 4, checkpoint={"every": 0}))[0]
    assert said.count("rank 1 is the slowest: ") == 1
    slowest = [json.loads(x)["slowest"] for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[:6]]
    assert all(s["rank"] == 1 and s["seconds"] > 0.3 for s in slowest)
