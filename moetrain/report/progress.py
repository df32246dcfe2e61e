"""What a run's folder tells of the run, now: its state, step, speed, what it took. Only reads; what is half-written,
damaged or not to be read is left out."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from moetrain import checkpoint
from moetrain.watchdog import told

_TAIL = 1 << 18
"""Bytes of the end of ``metrics.jsonl`` in which the speed of late is."""
_QUIET = 120.0
"""Seconds at the least in which a run need not write anything."""
_BEGINS = re.compile(r"moetrain \S+, torch \S+, (\d+) rank\(s\) on (\w+)")
_STEP = re.compile(r" step \d+/\d+: ")


class State(Enum):
    waiting = "waiting"
    starting = "starting"
    training = "training"
    silent = "silent"
    hung = "hung"
    stopped = "stopped"
    complete = "complete"


@dataclass
class Progress:
    folder: Path
    state: State = State.waiting
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    left: float | None = None  # seconds until the last step
    saved_step: int | None = None
    saved_age: float | None = None  # seconds
    life: int = 0
    ranks: int | None = None
    device: str | None = None
    rank_hours: float | None = None
    energy: float | None = None  # joules
    age: float | None = None  # seconds since something was written
    lines: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return found | {"folder": str(self.folder), "state": self.state.value}


def is_run(folder: Path) -> bool:
    if folder.name == "launch" and os.path.exists(folder / "pretrain.sbatch"):
        return False  # of a run that is a job
    return any(os.path.exists(folder / name) for name in ("config.yaml", "metrics.jsonl", "checkpoints", "launch"))


def runs_below(folder: Path, *, depth: int = 4) -> Iterator[Path]:
    """Folders of runs, in the order of their names."""
    try:
        found = sorted((x for x in os.scandir(folder) if x.is_dir() and x.name[0] != "."), key=lambda x: x.name)
    except OSError:
        return
    for entry in found:
        if is_run(Path(entry.path)):
            yield Path(entry.path)
        elif depth > 1 and not entry.is_symlink():
            yield from runs_below(Path(entry.path), depth=depth - 1)


def look(folder: Path, *, now: float) -> Progress:
    """What there is to know of a run at the time ``now``."""
    found = Progress(folder)
    _config(found)
    step_seconds, told_every = _metrics(found)
    lives = _lives(found)
    _checkpoint(found, now)
    found.age = _age(found, now)
    quiet = max(_QUIET, 4 * told_every)
    _state(found, lives, now=now, fresh=found.age is not None and found.age < quiet)
    if found.state in (State.starting, State.training) and found.step is not None and found.steps and step_seconds:
        found.left = max(0, found.steps - found.step) * step_seconds
    return found


def _config(found: Progress) -> None:
    path = found.folder / "config.yaml"
    if not path.exists() and (submitted := found.folder / "launch" / "config.yaml").exists():
        path = submitted
    try:
        config = yaml.safe_load(path.read_text())
        found.steps = int(config["train"]["steps"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        found.lines.append(f"config.yaml says no train.steps ({_first_line(error)})")


def _metrics(found: Progress) -> tuple[float, float]:
    """(seconds of a step, seconds between two looks at the device), of late; 0 where that is not known."""
    path = found.folder / "metrics.jsonl"
    records = list(_records(path, last=_TAIL))
    steps = [r for r in records if isinstance(r.get("step"), int) and "grad_norm" in r]
    timed = [r for r in steps if _positive(r.get("tokens_per_second")) and _positive(r.get("tokens"))]
    found.step = steps[-1]["step"] if steps else None
    found.loss = next((float(r["loss"]) for r in reversed(steps) if isinstance(r.get("loss"), int | float)), None)
    if any(_energy(r) is not None for r in records):
        found.energy = sum(_energy(r) or 0 for r in _records(path))
    if not timed:
        return 0.0, 0.0
    found.tokens_per_second = float(timed[-1]["tokens_per_second"])
    late = sorted(r["tokens"] / r["tokens_per_second"] for r in timed[-9:])
    seconds = late[len(late) // 2]
    return seconds, seconds * (timed[-1]["step"] - timed[-2]["step"] if len(timed) > 1 else 1)


def _records(path: Path, *, last: int | None = None) -> Iterator[dict[str, Any]]:
    """Of all lines, or of those in the ``last`` bytes; what is cut or damaged is passed over."""
    with suppress(OSError), path.open("rb") as file:
        if last is not None:
            file.seek(max(0, path.stat().st_size - last))
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def _energy(record: dict[str, Any]) -> float | None:
    """Joules of all ranks since the record before that has them."""
    energy = record.get("energy")
    joules = energy.get("joules") if isinstance(energy, dict) else None
    return float(joules) if isinstance(joules, int | float) and _positive(joules) else None


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


@dataclass
class _Life:
    """As rank 0's log has it."""

    ranks: int
    device: str
    first: float
    last: float
    stepped: bool = False


def _lives(found: Progress) -> list[_Life]:
    lives: list[_Life] = []
    with suppress(OSError), (found.folder / "logs" / "rank-0.log").open(errors="replace") as file:
        for line in file:
            begins = _BEGINS.search(line)
            at = _time(line) if begins or lives else None
            if begins and at:
                lives.append(_Life(int(begins[1]), begins[2], at, at))
            elif at:
                lives[-1].last = max(at, lives[-1].last)
                lives[-1].stepped |= _STEP.search(line) is not None
    if lives:
        found.ranks, found.device = lives[-1].ranks, lives[-1].device
        found.rank_hours = sum((life.last - life.first) * life.ranks for life in lives) / 3600
    return lives


def _time(line: str) -> float | None:
    """When a line was logged, by the clock of rank 0's host; None for the rest of one that was longer."""
    try:
        return time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")) + int(line[20:23]) / 1000
    except ValueError:
        return None


def _checkpoint(found: Progress, now: float) -> None:
    with suppress(OSError):
        newest = checkpoint.latest(found.folder / "checkpoints")
        if newest is not None:
            found.saved_step = checkpoint.step_of(newest)
            found.saved_age = now - (newest / "COMMITTED").stat().st_mtime


def _age(found: Progress, now: float) -> float | None:
    """Of what was written last: words, numbers, or a part of a checkpoint."""
    folder = found.folder
    with suppress(OSError):
        found.life, _ = checkpoint.ending(folder / "checkpoints")
    life = folder / "checkpoints" / f"life-{found.life:08d}"
    times = [t for path in (folder / "metrics.jsonl", folder / "logs" / "rank-0.log", life) if (t := _mtime(path))]
    with suppress(OSError):
        times += [t for path in life.glob("*/*") if (t := _mtime(path))]
    return now - max(times) if times else None


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _state(found: Progress, lives: list[_Life], *, now: float, fresh: bool) -> None:
    folder = found.folder
    if not found.life and not lives:
        found.state = State.waiting
        return
    end = folder / "checkpoints" / f"life-{found.life:08d}" / "ended"
    ended, said = _mtime(end), _mtime(folder / "logs" / "rank-0.log")
    again = ended is not None and said is not None and said > ended + 5  # a life that has not taken over yet
    if ended is not None and not again:
        word = _text(end)
        done = word == "it was done"
        enough = found.steps is None or (found.step or 0) >= found.steps
        if done and enough and os.path.exists(folder / "summary.txt"):
            found.state = State.complete
        else:
            found.state = State.stopped
            found.lines.append("left before the last step (train.exit_after)" if done else word)
        return
    hangs = folder / "hangs" / f"life-{found.life:08d}"
    if ended is None and found.life and any(_listed(hangs)):
        found.state = State.hung
        with suppress(TypeError, AttributeError):  # of another moetrain's, or damaged
            found.lines += told(hangs, found.ranks or 1)
    elif not fresh:
        found.state = State.silent
    elif again or not found.life or not (lives and lives[-1].stepped):
        found.state = State.starting
    else:
        found.state = State.training


def _listed(hangs: Path) -> list[Path]:
    try:
        return list(hangs.glob("rank-*.json"))
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError as error:
        return f"its last word cannot be read ({error.strerror})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
