"""The real ``moetrain train``: two ranks end to end, kill -9 in a step and in a save, torchrun, a config that stands
alone, a sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import whole
import yaml

STEPS = 24
COMMAND = [sys.executable, "-m", "moetrain", "train"]


def words(corpus: Path, folder: Path, *more: str) -> list[str]:
    return [
        "layout.ep=2", "model.vocab_size=512", "model.dim=32", "model.num_layers=2", "model.num_heads=4",
        "model.num_kv_heads=2", "model.moe.num_experts=4", "model.moe.hidden=32", f"train.steps={STEPS}",
        "train.batch=8",
        "train.micro_batch=2", "train.seq_len=32", "train.threads=1", "train.device=cpu", "train.validate_samples=8",
        "optim.warmup=4", "optim.lr=1e-2",
        "checkpoint.every=1", "checkpoint.keep=3", "logging.every=1", "data=folder",
        f"data.corpora.text.path={corpus}", f"run.dir={folder.parent}", f"run.name={folder.name}", *more,
    ]  # fmt: skip


def train(*argv: str, timeout: float = 120, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *argv], capture_output=True, text=True, timeout=timeout, env=os.environ | (env or {})
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    assert whole.newest(folder).name == f"step-{STEPS:08d}"
    return whole.tensors(whole.newest(folder))


@pytest.fixture(scope="module")
def unbroken(small_corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(*words(small_corpus, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) on cpu over gloo" in done.stdout
    assert "held out text" in done.stdout
    assert "max violation" in done.stdout
    return folder


def test_a_run_leaves_its_config_metrics_logs_and_checkpoints(unbroken) -> None:
    assert [step for step, _ in losses(unbroken)] == list(range(1, STEPS + 1))
    assert losses(unbroken)[-1][1] < losses(unbroken)[0][1] - 0.5
    kept = sorted(p.name for p in (unbroken / "checkpoints").iterdir())
    assert kept == ["life-00000001"] + [f"step-{n:08d}" for n in (STEPS - 2, STEPS - 1, STEPS)]
    assert (unbroken / "logs/rank-0.log").stat().st_size > 0
    assert (unbroken / "logs/rank-1.log").stat().st_size > 0
    config = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert config["layout"]["ep"] == 2
    assert config["model"]["moe"]["router"]["kind"] == "topk"


def test_a_complete_run_says_so_and_trains_nothing(unbroken, small_corpus) -> None:
    before = {p: p.stat().st_mtime_ns for p in (unbroken / "checkpoints").rglob("step-*/*")}
    again = train(*words(small_corpus, unbroken))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already complete" in again.stdout
    assert "another run.name" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (unbroken / "checkpoints").rglob("step-*/*")} == before


def test_the_resolved_config_stands_alone_on_one_rank(unbroken, tmp_path) -> None:
    """Same file, other layout and run: the first 20 losses agree to 1e-5."""
    words = ["layout.ep=1", f"run.dir={tmp_path}", "checkpoint.every=0"]
    done = train("--config", str(unbroken / "config.yaml"), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rank(s) on cpu" in done.stdout
    for (_, a), (_, b) in zip(losses(tmp_path / "run")[:20], losses(unbroken)[:20], strict=True):
        assert abs(a - b) < 1e-5


def test_kill_9_in_a_step_and_in_a_save_loses_nothing(unbroken, small_corpus, tmp_path) -> None:
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"

    def in_save() -> bool:
        """A save is under way: its folder is there."""
        return any(checkpoints.glob("life-*/step-*"))

    def in_step() -> bool:
        return len(list(checkpoints.glob("step-*"))) > 0 and not in_save() and len(losses_so_far(folder)) % 2 == 1

    fired = {"step": 0, "save": 0}
    for kind, moment, at_least in (("step", in_step, 4), ("save", in_save, 9), ("save", in_save, 14)):
        life = subprocess.Popen(
            [*COMMAND, *words(small_corpus, folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while life.poll() is None and time.monotonic() < deadline:
            far_enough = (folder / "metrics.jsonl").exists() and len(losses_so_far(folder)) >= at_least
            if far_enough and moment():
                os.kill(life.pid, signal.SIGKILL)  # the launcher only: its ranks have to die with it
                break
        life.wait(30)
        assert life.returncode == -signal.SIGKILL, "the run ended before the moment came"
        assert_nobody_lives(life.pid)
        fired[kind] += 1
        assert not (folder / "summary.txt").exists()
    last = train(*words(small_corpus, folder))
    assert last.returncode == 0, last.stdout + last.stderr
    assert "resumed from" in last.stdout
    assert fired == {"step": 1, "save": 2}
    assert losses(folder) == losses(unbroken), "one record a step, to the last bit those of the unbroken run"
    want, got = final_state(unbroken), final_state(folder)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def losses_so_far(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def assert_nobody_lives(session: int) -> None:
    """No process of the killed launcher's session is left."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        alive = [p for p in Path("/proc").glob("[0-9]*") if _session(p) == session]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"still alive: {alive}")


def _session(process: Path) -> int:
    try:
        state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return -1
    return -1 if state == "Z" else int(session)


def test_under_torchrun_the_same_words_are_a_rank(unbroken, small_corpus, tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "moetrain", "train", *words(small_corpus, tmp_path / "run", "train.exit_after=6")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"left at step 6 of {STEPS}" in done.stdout
    assert losses(tmp_path / "run") == losses(unbroken)[:6]


def test_a_rank_that_dies_is_named(small_corpus, tmp_path) -> None:
    folder = tmp_path / "run"
    life = subprocess.Popen(
        [*COMMAND, *words(small_corpus, folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [
        int(p.name)
        for p in Path("/proc").glob("[0-9]*")
        if (p / "environ").exists() and _parent(p) == life.pid and b"\0RANK=1\0" in (p / "environ").read_bytes()
    ]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    _, errors = life.communicate(timeout=60)
    assert life.returncode == 1
    assert "rank 1 failed (signal 9)" in errors
    assert "Traceback" not in errors


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return -1


def test_several_sets_are_validated_every_n_steps(small_corpus, tmp_path) -> None:
    """A corpus of weight 0 is a set of its own, and changes no training sample."""
    folder = tmp_path / "run"
    few = ["layout.ep=1", "train.steps=4", "optim.warmup=1", "train.validate_every=2", "checkpoint.every=0"]
    other = [f"data.corpora.other.path={small_corpus}", "data.corpora.other.weight=0"]
    done = train(*words(small_corpus, folder, *few, *other))
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(r["step"], r["validation"], r["nats_per_token"]) for r in records if "validation" in r]
    assert [(step, name) for step, name, _ in found] == [(2, "text"), (2, "other"), (4, "text"), (4, "other")]
    assert found[0][2] == found[1][2] > found[2][2] == found[3][2], "the same held-out text scores the same, and falls"


def test_a_sweep_skips_what_is_illegal_outlives_what_fails_and_resumes(small_corpus, tmp_path) -> None:
    few = ["layout.ep=1", "train.steps=4", "optim.warmup=1", "checkpoint.every=0"]
    sweep = ["-m", *words(small_corpus, tmp_path / "sweep", *few), "optim.lr=1e-3,1e30", "model.moe.router.top_k=2,9"]
    done = train(*sweep)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 points: 1 done, 2 skipped, 1 failed\n" in done.stdout
    assert "skipped optim.lr=0.001 model.moe.router.top_k=9: model.moe.router.top_k=9 is more than" in done.stdout
    points = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep/points").iterdir())]
    assert [point["status"] for point in points] == ["done", "skipped", "failed", "skipped"]
    assert points[0]["loss"] > 0
    assert "exit code" in points[2]["reason"]
    folder = Path(points[0]["folder"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 1e-3
    before = (folder / "summary.json").stat().st_mtime_ns
    again = train(*sweep[1:-1], "-m", sweep[-1])
    assert again.returncode == 1
    assert f"{folder}: done before\n" in again.stdout
    assert "4 points: 1 done, 2 skipped, 1 failed\n" in again.stdout
    assert train(*sweep[:-2], "router=topk,topp").stderr.startswith("error: router=topp: no such option")
    assert (folder / "summary.json").stat().st_mtime_ns == before
