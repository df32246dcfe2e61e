"""Sinks of real runs: W&B's and TensorBoard's files of a run that was killed and resumed, a server that is not there,
libraries that are not there; a profiler trace; memory that runs out."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="the extra wandb is not installed")
pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
from tensorboardX.proto.event_pb2 import Event
from wandb.proto import wandb_internal_pb2

from moetrain.cli.main import main

KEY = "0123456789abcdef" * 2 + "f1234567"
COMMAND = [sys.executable, "-m", "moetrain", "train"]


def words(corpus: Path, folder: Path, *more: str) -> list[str]:
    return [
        "model.vocab_size=512", "model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2",
        "model.moe.num_experts=4", "model.moe.hidden=32", "train.steps=20", "train.batch=8", "train.micro_batch=2",
        "train.seq_len=32", "train.threads=1", "train.device=cpu", "train.validate_samples=8", "optim.warmup=4",
        "checkpoint.every=5", "logging.every=2", "data=folder", f"data.corpora.text.path={corpus}",
        f"run.dir={folder.parent}", f"run.name={folder.name}", *more,
    ]  # fmt: skip


def train(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, timeout=240, env=os.environ | (env or {}))


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def of_wandb(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, numbers) of every offline run in a run folder: LevelDB's log format, of W&B's protocol buffers."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, part = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            part += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # full, last
                record, part = wandb_internal_pb2.Record.FromString(part), b""
                if record.WhichOneof("record_type") == "history":
                    items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                    found.append((record.history.step.num, items))
    return found


def of_tensorboard(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, number) of every event file, as TensorBoard purges them."""
    found: list[tuple[int, str, float]] = []
    for path in sorted(folder.glob("tensorboard/events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.WhichOneof("what") == "session_log":
                found = [x for x in found if x[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_a_run_that_was_killed_and_resumed_is_one_series(small_corpus, tmp_path) -> None:
    folder = tmp_path / "run"
    argv = words(small_corpus, folder, "logging.wandb=offline", "logging.tensorboard=true", "train.steps=400")
    env = {"WANDB_API_KEY": KEY, "HOME": str(tmp_path / "home")}
    life = subprocess.Popen(
        [*COMMAND, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | env
    )
    until = time.monotonic() + 200
    seen: list = []
    while life.poll() is None and time.monotonic() < until and not (seen and seen[-1][0] % 5):
        seen = of_tensorboard(folder)
        time.sleep(0.05)
    life.send_signal(signal.SIGKILL)
    life.wait(30)
    assert seen, "the first life has shown nothing"
    newest = max(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))
    steps = newest + 12
    done = train(*argv, f"train.steps={steps}", "run.allow=[train.steps]", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    want = losses(folder)
    assert list(want) == list(range(1, steps + 1))
    history = of_wandb(folder)
    assert [(step, x["loss"]) for step, x in history if "loss" in x] == list(want.items())
    assert [step for step, _ in history] == list(want), "validation is of the last step"
    assert "validation/text/nats_per_token" in history[-1][1]
    shown = [(step, x) for step, name, x in of_tensorboard(folder) if name == "loss"]
    assert [step for step, _ in shown] == list(want)
    assert [x for _, x in shown] == pytest.approx(list(want.values()))
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    for path in folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), f"the API key is in {path}"
    assert not list((tmp_path / "home").glob("**/*wandb*")), "nothing is written to the home folder"


def test_a_server_that_is_not_there_holds_nothing_up(small_corpus, tmp_path) -> None:
    folder, env = tmp_path / "run", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    since = time.monotonic()
    done = train(*words(small_corpus, folder, "logging.wandb=online", "logging.sink_timeout=3"), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - since < 90
    said = [line for line in done.stdout.splitlines() if line.startswith("wandb:")]
    assert len(said) == 1, done.stdout
    assert "the run goes on offline" in said[0] or "given up" in said[0]
    assert list(losses(folder)) == list(range(1, 21))


def test_what_is_missing_is_said_before_the_first_step(small_corpus, tmp_path, monkeypatch, capsys) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    cases = {"logging.wandb=online": "finds no API key: set WANDB_API_KEY in the environment"}
    for word, rule in cases.items():
        assert main(["train", *words(small_corpus, tmp_path / "run", word)]) == 2
        assert rule in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for word, extra in (("logging.wandb=offline", "wandb"), ("logging.tensorboard=true", "tensorboard")):
        assert main(["train", *words(small_corpus, tmp_path / "run", word)]) == 2
        said = capsys.readouterr().err
        assert f"pip install 'moetrain[{extra}]'" in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_trace_of_chosen_steps_and_ranks(small_corpus, tmp_path) -> None:
    folder = tmp_path / "run"
    done = train(*words(small_corpus, folder, "trace.steps=[3,4]", "trace.ranks=[1]", "layout.ep=2", "train.steps=6"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in (folder / "traces").iterdir()] == ["steps-00000003-00000004-rank-1.json.gz"]
    with gzip.open(folder / "traces" / "steps-00000003-00000004-rank-1.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sorted(name for name in names if name.startswith("step ")) == ["step 3", "step 4"]
    assert any("mm" in name for name in names)
    assert any("all_to_all" in name for name in names)


LIMITED = """
import resource, sys
import moetrain.run
from moetrain.cli.main import main
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (700 << 20),) * 2)
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_where_memory_runs_out_the_keys_that_lower_it_are_named(small_corpus, tmp_path) -> None:
    big = ("model.dim=256", "train.batch=256", "train.micro_batch=256", "train.seq_len=512")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "train", *words(small_corpus, tmp_path / "run", *big)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "out of memory. What lowers it, the same run: recompute.mode=selective" in said
    assert "train.micro_batch=128" in said
    assert f"moetrain memory --config {tmp_path}/run/config.yaml" in said
    assert said.split(" (traceback")[0].removeprefix("rank 0: ") in (tmp_path / "run/logs/rank-0.log").read_text()
