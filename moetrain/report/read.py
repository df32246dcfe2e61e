"""A run's metrics, read from its folder: series over steps, and the loads of the last logging steps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config import UserError
from moetrain.telemetry.alerts import METRICS

LAST = 10
"""Logging steps whose loads a heat map of a run is the mean of."""


@dataclass(frozen=True)
class History:
    """Everything a report draws. Lists over steps are of one length each, in order."""

    name: str
    steps: list[int]
    loss: list[float]
    held_out: dict[str, list[tuple[int, float]]]  # set -> (step, nats per token)
    tokens: list[int]  # of each step
    tokens_per_second: list[float]
    seconds: float  # that the steps took, without start-up, held-out data and saves
    dropped: list[int]  # assignments of each step
    logged: list[int]  # the steps whose health is known
    health: dict[str, list[list[float]]]  # metric -> step -> layer
    load_LE: list[list[float]]  # load / mean load, mean over some last logging steps; experts may be runs of neighbours
    loads_of: int  # how many steps that are
    neighbours: int  # experts of such a run
    top_pair: list[tuple[int, int]]  # layer -> the experts of its most frequent pair at the last logging step
    layers: list[int]  # the MoE layers' numbers in the model


def history(folder: Path, layers: list[int] | None, *, over: int | None = None) -> History:
    """Of a run folder; raises ``UserError`` where there is nothing to draw.

    ``layers``: None = 0, 1, 2 ... ``over``: loads are of the logging steps among so many last steps; None = of the last
    ``LAST`` logging steps.
    """
    records = _records(folder)
    steps = [r for r in records if "loss" in r and not r.get("skipped")]
    if not steps:
        raise UserError(f"{folder / 'metrics.jsonl'} has no step yet: train first, or name another run's folder")
    logged = [r for r in steps if r.get("health")]
    last = logged[-1]["health"] if logged else {}
    known = [name for name in METRICS if all(name in r["health"] for r in logged)] if logged else []
    since = 0 if over is None else steps[-1]["step"] - over
    recent = [r["health"]["load"] for r in (logged[-LAST:] if over is None else logged) if r["step"] > since]
    recent = [load for load in recent if _shape(load) == _shape(recent[-1])]
    held_out: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if "validation" in r:
            held_out.setdefault(r["validation"], []).append((r["step"], r["nats_per_token"]))
    number = len(last.get("load", []))
    return History(
        name=str(folder), steps=[r["step"] for r in steps], loss=[r["loss"] for r in steps], held_out=held_out,
        tokens=[r.get("tokens", 0) for r in steps],
        tokens_per_second=[r["tokens_per_second"] for r in steps if "tokens_per_second" in r], seconds=_seconds(steps),
        dropped=[r.get("dropped", 0) for r in steps], logged=[r["step"] for r in logged],
        health={name: [r["health"][name] for r in logged] for name in known},
        load_LE=[_mean(list(rows)) for rows in zip(*recent, strict=True)] if recent else [], loads_of=len(recent),
        neighbours=last.get("neighbours", 1),
        top_pair=[(a, b) for a, b in last.get("top_pair_experts", [])],
        layers=layers if layers and len(layers) == number else list(range(number)),
    )  # fmt: skip


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name that of a run or a sweep, for example runs/quickstart")
    if not path.exists():
        raise UserError(
            f"{folder} is neither a run (no metrics.jsonl) nor a sweep (no points/000.json): name one that is"
        )
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not text"
        raise UserError(f"{path} cannot be read ({why}): name the folder of a run that has trained") from e
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            if number == len(lines):  # cut in the middle: the run goes on, or was killed
                break
            raise UserError(f"{path}:{number} is not JSON ({e.msg}): take that line out") from e
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{path}:{number} is not a record of a step: name the folder of a run")
        found.append(record)
    return found


def _seconds(steps: list[dict[str, Any]]) -> float:
    """A rate is that of the steps since the one before it."""
    seconds, tokens = 0.0, 0
    for r in steps:
        tokens += r.get("tokens", 0)
        if rate := r.get("tokens_per_second"):
            seconds, tokens = seconds + tokens / rate, 0
    return seconds


def _shape(load: list[list[float]]) -> list[int]:
    return list(map(len, load))


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
