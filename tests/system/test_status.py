"""``moetrain status`` over real runs: complete, left, training, killed, hung, damaged; it changes nothing."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_train_command import COMMAND, train, words

from moetrain.cli import status
from moetrain.cli.main import main
from moetrain.report.progress import State, look, runs_below


def state(folder: Path, *, later: float = 0) -> tuple[str, list[str]]:
    found = look(folder, now=time.time() + later)
    return found.state.value, found.lines


def everything(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory) -> Path:
    """done/: complete. some/left: left after three of 24 steps, then killed in a second life."""
    folder = tmp_path_factory.mktemp("status") / "runs"
    one = "layout.ep=1"
    done = train(*words(small_corpus, folder / "done", one, "train.steps=6"), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    argv = words(small_corpus, folder / "some" / "left", one, "train.exit_after=3")
    done = train(*argv, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_states_of_a_run(runs, small_corpus, capsys) -> None:
    assert [p.relative_to(runs) for p in runs_below(runs)] == [Path("done"), Path("some/left")]
    before = everything(runs)
    assert main(["status", str(runs)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert main(["status", "--json", str(runs)]) == 0
    done, left = json.loads(capsys.readouterr().out)
    assert everything(runs) == before, "it only reads"

    assert table[0].split()[:4] == ["run", "state", "step", "loss"]
    assert table[1].split()[:3] == [str(runs / "done"), "complete", "6/6"]
    assert table[2].split()[:3] == [str(runs / "some" / "left"), "stopped", "3/24"]
    assert table[3].strip() == "left before the last step (train.exit_after)"
    last = [json.loads(x) for x in (runs / "done/metrics.jsonl").read_text().splitlines() if "grad_norm" in x][-1]
    assert done["loss"] == last["loss"]
    assert (done["state"], done["saved_step"], done["ranks"], done["device"]) == ("complete", 6, 1, "cpu")
    assert 0 < done["rank_hours"] < 1
    assert (left["state"], left["step"], left["steps"], left["saved_step"]) == ("stopped", 3, 24, 3)
    assert left["left"] is None

    folder = runs / "some" / "left"
    argv = words(small_corpus, folder, "layout.ep=1", "train.steps=100000", "run.allow=[train.steps]")
    with open(runs.parent / "out", "wb") as out:
        life = subprocess.Popen([*COMMAND, *argv], stdout=out, stderr=out, start_new_session=True)
    try:
        until = time.monotonic() + 300
        seen = []
        while "training" not in seen:
            assert time.monotonic() < until, seen
            assert life.poll() is None
            seen.append(state(folder)[0])
            time.sleep(0.1)
        assert set(seen) <= {"stopped", "starting", "training"}
        time.sleep(2)
        going = look(folder, now=time.time())
        assert going.state is State.training
        assert going.left is not None
        assert going.left > 60
        assert (going.step or 0) > 3
        assert going.steps == 100000
        assert going.life == 2
        first_life = left["rank_hours"]
        assert (going.rank_hours or 0) > first_life
    finally:
        os.kill(life.pid, signal.SIGKILL)
        life.wait()
    assert state(folder)[0] == "training", "so far it cannot be told"
    assert state(folder, later=3600)[0] == "silent"
    main(["status", str(folder)])
    assert capsys.readouterr().out.splitlines()[1].split()[1] == "training"

    hangs = folder / "hangs" / "life-00000002"
    hangs.mkdir(parents=True)
    here = {"part": "forward", "step": 7, "words": "", "seconds": 9.0}
    (hangs / "rank-0.json").write_text(json.dumps(here))
    assert state(folder) == ("hung", ["hang: rank 0 is in forward of step 7 (0 collectives so far)"])


def test_asked_to_stop(runs, small_corpus) -> None:
    folder = runs / "asked"
    argv = words(small_corpus, folder, "layout.ep=1", "train.steps=100000", "run.time_limit=0.01")
    done = train(*argv, timeout=400)
    assert done.returncode == 4, done.stdout + done.stderr
    found, lines = state(folder)
    assert found == "stopped"
    assert "asked to stop by run.time_limit: saved at step" in lines[0]
    assert state(folder, later=10**6)[0] == "stopped"


def test_half_written_and_damaged_folders(runs, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 9}\n")
    assert state(folder) == ("waiting", [])
    (folder / "config.yaml").write_text("train: [")
    (folder / "metrics.jsonl").write_bytes(
        b'\xff\n[1]\n{"step": "x", "grad_norm": 1}\n{"step": 2, "grad_norm": 0.5, "loss"'
    )
    (folder / "logs").mkdir()
    (folder / "logs" / "rank-0.log").write_bytes(
        b"\xfe\n2026-99-99 12:00:00,000 INFO moetrain 1, torch 2, 4 rank(s) on cpu\n"
    )
    (folder / "checkpoints").write_text("a file")
    found = look(folder, now=time.time())
    assert (found.state, found.step, found.rank_hours) == (State.waiting, None, None)
    assert found.lines[0].startswith("config.yaml says no train.steps")
    assert main(["status", str(folder)]) == 0
    assert "waiting" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "it is no folder; give the folder of a run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["status", str(tmp_path / "empty")]) == 2
    assert "no run lies below it" in capsys.readouterr().err


def test_energy_and_gpu_hours(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    record = {"step": 1, "grad_norm": 1.0, "loss": 2.0, "tokens": 100, "tokens_per_second": 50.0}
    records = [
        record | {"energy": {"joules": 1.8e6}},
        record | {"step": 2, "energy": {"joules": 1.8e6}},
        record | {"step": 3},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.yaml").write_text("train: {steps: 10}\n")
    head = "INFO moetrain 0.1.0, torch 2.13.0, {} rank(s) on cuda over nccl, layout pp1"
    lines = [
        f"2026-01-02 10:00:00,000 {head.format(8)}", "2026-01-02 11:00:00,000 INFO step 2/10: loss 2", "  a traceback",
        f"2026-01-02 13:00:00,000 {head.format(4)}", "2026-01-02 13:30:00,000 INFO step 3/10: loss 2",
    ]  # fmt: skip
    (folder / "logs" / "rank-0.log").write_text("\n".join(lines) + "\n")
    found = look(folder, now=time.time())
    assert (found.rank_hours, found.ranks, found.device) == (pytest.approx(8 + 2), 4, "cuda")
    assert found.energy == pytest.approx(3.6e6)
    main(["status", str(folder)])
    out = capsys.readouterr().out
    assert "10 GPU" in out
    assert "1 kWh" in out
    assert "14 s" in out, "seven steps of two seconds"


def test_spans() -> None:
    seconds = [0.4, 59, 61, 3600, 7322, 90061]
    assert [status.span(x) for x in seconds] == ["0 s", "59 s", "1 min 1 s", "1 h", "2 h 2 min", "1 d 1 h"]


def test_help_names_every_state(capsys) -> None:
    with pytest.raises(SystemExit):
        status.main(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf" {s.value} +\w", said) for s in State)
