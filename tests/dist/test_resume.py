"""What a run goes on from: the newest whole checkpoint, an older one, another run's; with its config as it was, or as it
is allowed to be."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import whole
from test_train import MODEL, TRAIN, config

from moetrain import checkpoint
from moetrain.config import UserError
from moetrain.job import Config, checkpoints
from moetrain.run import StoppedError, run
from moetrain.train import Trainer
from moetrain.world import World

SMALL = MODEL | {"num_layers": 2}


def life(rank: int, world: int, cfg: Config) -> str:
    """A life of a run: what it logged, or what stopped it."""
    group = dist.group.WORLD if world > 1 else None
    here = World(rank, world, rank, world, torch.device("cpu"), "gloo" if world > 1 else "", group)
    try:
        run(cfg, here)
    except UserError as error:
        return f"error: {error}"
    return (cfg.run.folder / "logs" / f"rank-{rank}.log").read_text()


def cfg(corpus: Path, folder: Path, steps: int = 3, **groups: dict) -> Config:
    train = TRAIN | {"steps": 6, "exit_after": steps} | groups.pop("train", {})
    saves = {"every": 1, "keep": 0} | groups.pop("checkpoint", {})
    model = SMALL | groups.pop("model", {})
    return config(corpus, folder, model=model, train=train, checkpoint=saves, logging={"every": 1}, **groups)


def steps_of(folder: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) or 0 for path in checkpoint.committed(folder / "checkpoints"))


def same(a: Path, b: Path) -> bool:
    x, y = whole.tensors(a), whole.tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def meta(folder: Path) -> dict:
    return checkpoint.read_meta(whole.newest(folder))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def corpus(small_corpus) -> Path:
    logging.getLogger("moetrain").handlers.clear()
    return small_corpus


def test_a_changed_trajectory_has_to_be_allowed_and_is_recorded(ranks, corpus, tmp_path) -> None:
    folder, pool = tmp_path / "run", ranks(1)
    pool.run(life, cfg(corpus, folder, 2))
    slower = {"lr": 5e-3, "warmup": 2, "clip": 0.5}
    said = pool.run(life, cfg(corpus, folder, 1, optim=slower))[0]
    assert "step-00000002 was trained otherwise: optim.lr was 0.01, is 0.005" in said
    assert "'run.allow=[optim.lr]'" in said
    assert steps_of(folder) == [1, 2]
    allowed = {"allow": ["optim.lr"]}
    said = pool.run(life, cfg(corpus, folder, 1, optim=slower, run=allowed))[0]
    assert "changed since: optim.lr: 0.01 -> 0.005 (trajectory)" in said
    assert meta(folder)["changes"] == [{"step": 2, "key": "optim.lr", "old": 0.01, "new": 0.005}]
    said = pool.run(life, cfg(corpus, folder, 1, optim=slower, checkpoint={"every": 2}))[0]
    assert "changed since: checkpoint.every: 1 -> 2 (free)" in said
    assert len(meta(folder)["changes"]) == 1, "allowed once, it is what the run is now"
    said = pool.run(life, cfg(corpus, folder, 1, optim=slower, model={"dim": 64}))[0]
    assert "error: " in said
    assert "another model" in said


def test_damage_is_named_and_the_next_older_one_is_used(ranks, corpus, tmp_path) -> None:
    folder, pool, straight = tmp_path / "run", ranks(2), tmp_path / "straight"
    saves, layout = folder / "checkpoints", {"layout": {"dp": 2, "ep": 2}}
    pool.run(life, cfg(corpus, straight, 4, **layout))
    pool.run(life, cfg(corpus, folder, 3, **layout))
    flip(saves / "step-00000003/rank-00001.safetensors")
    (saves / "step-00000002/rank-00000.safetensors").unlink()
    exact = {"resume": str(saves / "step-00000003")}
    for said in pool.run(life, cfg(corpus, folder, 1, run=exact, **layout)):
        assert "step-00000003 is damaged: rank-00001.safetensors fails the checksum of" in said
    assert steps_of(folder) == [1, 2, 3]
    said = pool.run(life, cfg(corpus, folder, 3, **layout))[0]
    for words in ("rank-00001.safetensors fails the checksum", "rank-00000.safetensors is missing", "step-00000001 at"):
        assert words in said
    assert len(list(saves.glob("step-*.aside-*"))) == 2
    assert same(whole.newest(folder), whole.newest(straight))
    for path in saves.glob("step-*"):
        flip(path / "index.json")
    for _ in range(2):
        for said in pool.run(life, cfg(corpus, folder, 1, **layout)):
            assert "no whole checkpoint is left" in said


def test_an_older_checkpoint_by_its_path_and_the_same_command_again(ranks, corpus, tmp_path) -> None:
    folder, pool = tmp_path / "run", ranks(1)
    pool.run(life, cfg(corpus, folder, 3))
    first = whole.tensors(whole.newest(folder))
    back = {"resume": str(folder / "checkpoints/step-00000001")}
    said = pool.run(life, cfg(corpus, folder, 1, run=back))[0]
    assert "step-00000003 is newer than where this life begins" in said
    assert steps_of(folder) == [1, 2]
    pool.run(life, cfg(corpus, folder, 1, run=back))
    assert steps_of(folder) == [1, 2, 3]
    again = whole.tensors(whole.newest(folder))
    assert all(torch.equal(first[name], again[name]) for name in first)
    elsewhere = {"resume": str(tmp_path / "x/checkpoints/step-00000001")}
    said = pool.run(life, cfg(corpus, folder, 1, run=elsewhere))[0]
    assert "to begin a new run from another one's, use run.fork" in said


def test_a_fork_leaves_its_source_as_it_was(ranks, corpus, tmp_path) -> None:
    source, pool = tmp_path / "source", ranks(1)
    pool.run(life, cfg(corpus, source, 3))
    before = files(source)
    fork = {"fork": "source@2"}
    pool.run(life, cfg(corpus, tmp_path / "fork", 1, run=fork))
    assert same(whole.newest(tmp_path / "fork"), source / "checkpoints/step-00000003")
    assert steps_of(tmp_path / "fork") == [3]
    pool.run(life, cfg(corpus, tmp_path / "fork", 1, run=fork))
    assert steps_of(tmp_path / "fork") == [3, 4], "the same command continues"
    decay = {"schedule": "wsd", "decay": 3, "lr": 1e-2, "warmup": 2, "clip": 0.5}
    branch = {"fork": str(source), "allow": ["optim"]}
    said = pool.run(life, cfg(corpus, tmp_path / "decay", 3, run=branch, optim=decay))[0]
    assert "held out small" in said
    assert [c["key"] for c in meta(tmp_path / "decay")["changes"]] == ["optim.schedule", "optim.decay"]
    for text, says in (("source@7", "has steps 1, 2, 3"), ("none", "is the folder of a run"), ("source@x", "not a step")):
        assert says in pool.run(life, cfg(corpus, tmp_path / "bad", 1, run={"fork": text}))[0]
    assert files(source) == before


def test_a_warm_start_takes_the_weights_alone_and_resets_happen_once(ranks, corpus, tmp_path) -> None:
    source, warm, pool = tmp_path / "source", tmp_path / "warm", ranks(1)
    pool.run(life, cfg(corpus, source, 2))
    said = pool.run(life, cfg(corpus, warm, 1, run={"warm_start": "source"}))[0]
    assert "resumed from the weights of" in said
    assert "at step 0, 0 samples seen" in said
    assert meta(warm)["step"] == 1
    losses = [json.loads(line)["loss"] for line in (source / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((warm / "metrics.jsonl").read_text().splitlines()[0])["loss"] < losses[0] - 0.01
    anew = {"reset": ["optim", "data"]}
    pool.run(life, cfg(corpus, source, 1, run=anew))
    assert (meta(source)["updates"], meta(source)["consumed"]) == (1, TRAIN["batch"])
    pool.run(life, cfg(corpus, source, 1, run=anew))
    assert (meta(source)["updates"], meta(source)["consumed"]) == (2, 2 * TRAIN["batch"])


def test_another_batch_keeps_the_position_in_samples(ranks, corpus, tmp_path) -> None:
    folder, pool = tmp_path / "run", ranks(1)
    pool.run(life, cfg(corpus, folder, 3))
    pool.run(life, cfg(corpus, folder, 2, train={"batch": 12}, run={"allow": ["train.batch"]}))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["consumed"] for r in records if "loss" in r] == [8, 16, 24, 36, 48]


def test_other_data_is_noticed(ranks, corpus, tmp_path) -> None:
    folder, pool = tmp_path / "run", ranks(1)
    pool.run(life, cfg(corpus, folder, 1))
    masked = {"corpora": {"small": {"path": str(corpus)}}, "mask_documents": True}
    assert "trained otherwise: data.mask_documents" in pool.run(life, cfg(corpus, folder, 1, data=masked))[0]
    pool.run(life, cfg(corpus, folder, 1, data=masked, run={"allow": ["data"]}))
    assert steps_of(folder) == [1, 2]


def test_keep_every(ranks, corpus, tmp_path) -> None:
    ranks(1).run(life, cfg(corpus, tmp_path / "run", 5, checkpoint={"keep": 1, "keep_every": 2}))
    assert steps_of(tmp_path / "run") == [2, 4, 5]


def test_it_stops_where_the_file_says_and_goes_on(ranks, corpus, tmp_path) -> None:
    """A signal to one rank, the file, the time limit, another life: seen by all at the same step, and saved."""
    straight, pool = tmp_path / "straight", ranks(2)
    layout = {"layout": {"dp": 2, "ep": 2}}
    pool.run(life, cfg(corpus, straight, 6, **layout))
    for how in ("signal", "file", "limit"):
        folder = tmp_path / how
        late = {"time_limit": 1e-3} if how == "limit" else {}
        for said in pool.run(stopped, cfg(corpus, folder, 6, run=late, checkpoint={"every": 0}, **layout), how):
            assert "asked to stop by" in said, said
            assert "the same command continues" in said
        reached = steps_of(folder)
        assert len(reached) == 1
        assert 2 <= reached[0] < 6
        (folder / "stop").unlink(missing_ok=True)  # as preflight does
        pool.run(life, cfg(corpus, folder, 6, checkpoint={"every": 0}, **layout))
        assert same(whole.newest(folder), whole.newest(straight))
    folder = tmp_path / "superseded"
    for said in pool.run(stopped, cfg(corpus, folder, 6, checkpoint={"every": 0}, **layout), "life"):
        assert "life 1 of the run was taken over by life 2" in said
    assert steps_of(folder) == []


def stopped(rank: int, world: int, cfg: Config, how: str) -> str:
    step, steps = Trainer.step, [0]

    def late(self, **more):
        steps[0] += 1
        if steps[0] == 1 and how == "signal" and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if steps[0] == 1 and rank == 0 and how == "file":
            (cfg.run.folder / "stop").touch()
        if steps[0] == 1 and rank == 0 and how == "life":
            checkpoint.take_over(checkpoints(cfg))
        return step(self, **more)

    Trainer.step = late
    try:
        return life(rank, world, cfg)
    except StoppedError as error:
        return str(error)
    finally:
        Trainer.step = step
