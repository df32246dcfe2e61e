"""Real processes that are killed, stopped, taken over and asked to leave: exit codes, and what is said."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drawn import commit
from test_train_command import assert_nobody_lives, losses, train, words

from moetrain.cli import ranks
from moetrain.config import load
from moetrain.job import Config
from moetrain.train import CorruptionError
from moetrain.world import World

ROOT = Path(__file__).parents[2]
_STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def nobody_left():
    yield
    for life in _STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.pid, signal.SIGKILL)  # its ranks go with it
        life.wait()
    _STARTED.clear()


def start(log: Path, *command: str) -> subprocess.Popen[bytes]:
    """To a file: a pipe that nobody reads would stop it."""
    with log.open("wb") as file:
        _STARTED.append(subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, cwd=ROOT))
    return _STARTED[-1]


def ended(life: subprocess.Popen[bytes], log: Path) -> str:
    """What it said."""
    life.wait(timeout=400)
    return log.read_text()


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def rank_pids(launcher: int) -> list[int]:
    """Of rank 0 and on."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        environ = dict(x.split(b"=", 1) for x in environment(path).split(b"\0") if b"=" in x)
        if environ.get(b"MOETRAIN_PARENT") == str(launcher).encode() and b"RANK" in environ:
            found[int(environ[b"RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(what, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def test_what_ends_a_run_and_with_which_code(small_corpus, tmp_path) -> None:
    """One run of two ranks, taken over (5), asked to leave (4), hung (6), killed and started again (0)."""
    folder = tmp_path / "run"
    argv = words(small_corpus, folder, "layout.ep=2", "train.steps=100000", "checkpoint.every=20", "checkpoint.keep=2")

    def steps() -> int:
        return losses(folder)[-1][0] if (folder / "metrics.jsonl").exists() and losses(folder) else 0

    def goes_on(life: subprocess.Popen[bytes], number: int) -> None:
        at = steps()
        wait_for(lambda: f'"life":{number}' in newest() and steps() > at + 25)
        assert life.poll() is None

    def newest() -> str:
        for path in sorted((folder / "checkpoints").glob("step-????????/index.json"), reverse=True):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                return path.read_text()
        return ""

    logs = [tmp_path / f"{n}.log" for n in range(4)]
    command = [sys.executable, "-m", "moetrain", "train", *argv]
    first = start(logs[0], *command)
    wait_for(lambda: steps() > 25)
    second = start(logs[1], *command)
    said = ended(first, logs[0])
    assert first.returncode == 5, said
    assert "life 1 of the run was taken over by life 2" in said
    goes_on(second, 2)
    second.send_signal(signal.SIGTERM)
    said = ended(second, logs[1])
    assert second.returncode == 4, said
    assert "the same command continues" in said
    third = start(logs[2], *command, "train.timeout=5")
    goes_on(third, 3)
    os.kill(rank_pids(third.pid)[1], signal.SIGSTOP)
    said = ended(third, logs[2])
    assert third.returncode == 6, said
    assert "hang: rank 0 is in " in said
    assert "hang: rank 1 said nothing: stopped, cut off or gone; the others wait for it" in said
    fourth = start(logs[3], *command, "run.restarts=1")
    goes_on(fourth, 4)
    os.kill(rank_pids(fourth.pid)[1], signal.SIGKILL)
    goes_on(fourth, 5)
    (folder / "stop").touch()
    said = ended(fourth, logs[3])
    assert fourth.returncode == 4, said
    assert "rank 1 failed (signal 9)" in said
    assert "the ranks are started again (0 more times at the most)" in said
    assert [step for step, _ in losses(folder)] == list(range(1, steps() + 1)), "each step once"
    for life in (first, second, third, fourth):
        assert_nobody_lives(life.pid)


def test_torchrun_loses_a_node_and_gets_one_back(small_corpus, tmp_path) -> None:
    """Two agents of 1:2 nodes: two ranks, one where an agent is killed, two where another one comes."""
    folder, name = tmp_path / "run", f"nodes-{os.getpid()}"
    argv = words(
        small_corpus, folder, "layout.ep=1", "layout.dp=-1", "train.steps=100000", "checkpoint.every=20",
        "checkpoint.keep=2", "train.timeout=30",
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def agent(number: int) -> subprocess.Popen[bytes]:
        return start(
            tmp_path / f"agent-{number}.log", "env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=9",
            "--monitor-interval=0.2", "--local-addr=127.0.0.1", "--rdzv-backend=c10d", f"--rdzv-id={name}",
            f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={int(number == 0)},last_call_timeout=3",
            "-m", "moetrain", "train", *argv,
        )  # fmt: skip

    def listens() -> bool:
        with socket.socket() as there:
            return there.connect_ex(("127.0.0.1", port)) == 0

    def goes_on_with(ranks: int) -> None:
        """Steps of a life of so many ranks come."""
        log = folder / "logs" / "rank-0.log"

        def comes() -> bool:
            before, _, after = log.read_text().rpartition(" rank(s) on cpu") if log.exists() else ("", "", "")
            return before.endswith(f" {ranks}") and after.count(": loss ") > 30

        wait_for(comes)

    first = agent(0)
    wait_for(listens)
    second = agent(1)
    goes_on_with(2)
    os.kill(second.pid, signal.SIGKILL)
    goes_on_with(1)
    third = agent(2)
    goes_on_with(2)
    (folder / "stop").touch()
    for number, left in {0: first, 2: third}.items():
        said = ended(left, tmp_path / f"agent-{number}.log")
        assert left.returncode == 0, said
    steps = [step for step, _ in losses(folder)]
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    said = (folder / "logs" / "rank-0.log").read_text()
    assert re.search(r"life \d+ of the run begins; life \d+ ended: .*gloo", said)
    assert re.search(r"life \d+ of the run begins; life \d+ ended: asked to stop by a signal", said)
    assert "asked to stop by the file stop in its folder" in said
    assert not [p for p in Path("/proc").glob("[0-9]*") if name.encode() in environment(p)], "no process is left"


def test_a_corrupt_rank_has_a_code_of_its_own(monkeypatch, capsys, small_corpus, tmp_path) -> None:
    def corrupt(cfg: Config, world: World) -> None:
        raise CorruptionError("step 3, run twice, has not the same bits")

    monkeypatch.setattr(ranks, "run", corrupt)
    cfg = load({"train": {"device": "cpu"}, "run": {"dir": str(tmp_path)}}, Config)
    assert ranks.be_rank(cfg, checked=True) == 7
    assert "error: step 3, run twice" in capsys.readouterr().err


def test_a_step_that_breaks_is_named_kept_and_replayed(small_corpus, tmp_path) -> None:
    """A learning rate that no weights survive: on two ranks, then that step again on one."""
    folder = tmp_path / "run"
    done = train(
        *words(
            small_corpus, folder, "layout.ep=2", "train.steps=50", "optim.lr=1e30", "optim.clip=0", "checkpoint.every=0"
        )
    )
    assert done.returncode == 1, done.stdout
    assert "no checkpoint of the run is there to go back to: lower checkpoint.every" in done.stderr
    (kept,) = (folder / "bad-steps").glob("step-????????")
    step = int(kept.name[5:])
    assert f"step {step} run again: first not finite in " in done.stdout
    replay = [sys.executable, "-m", "moetrain", "replay", str(kept), "layout.ep=1", "layout.dp=1"]
    again = subprocess.run(replay, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert f"step {step} on 1 rank(s): bad again" in again.stdout
    first = next(line for line in done.stdout.splitlines() if "run again" in line)
    module = first.split("first not finite in ")[1].split(",")[0]
    assert f"first not finite in {module}," in again.stdout
    whole = subprocess.run(
        [*replay[:4], str(folder / "config.yaml")], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert (whole.returncode, len(whole.stderr.splitlines())) == (2, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="faults are those of Linux")
def test_a_short_chaos(tmp_path) -> None:
    """Two faults, drawn by the commit: what is left is the unbroken run."""
    kinds = ["kill in forward", "kill in backward", "kill in optimizer", "kill in save", "kill in commit", "SIGTERM"]
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--faults", "2", "--seed", commit()]
    done = subprocess.run(
        [*command, "--dir", str(tmp_path / "chaos"), "--out", str(tmp_path / "found.json"), "--kinds", *kinds],
        capture_output=True, text=True, timeout=900, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "found.json").read_text())["faults"]) >= 2
