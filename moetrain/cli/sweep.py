"""The points of a sweep: an illegal one is skipped with the reason, a failed one does not stop the rest, and one that
is done is not run again, so that the same command resumes a sweep. ``points/NUMBER.json`` says what became of each."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

from moetrain import config as configs
from moetrain.config import UserError
from moetrain.job import Config
from moetrain.report.points import Point, Status, counted, paths, read


def run_point(
    make: Callable[[], Config], run: Callable[[Config], str], *, sweep: Path, number: int, overrides: list[str]
) -> float:
    """Make a point's config and run it: its held-out loss, or infinity, which a sweeper minimizes away.

    ``run`` returns why a run failed, or nothing; it raises ``UserError`` for what cannot be run.
    """
    folder, loss = "", None
    try:
        cfg = make()
        folder = str(cfg.run.folder)
        before = _finished(cfg)
        reason = "" if before else run(cfg)
        status = Status.failed if reason else Status.done
        if not reason:
            loss = _loss(cfg.run.folder)
        if before:
            print(f"{folder}: done before", flush=True)
    except UserError as e:
        status, reason = Status.skipped, str(e)
        print(f"skipped {' '.join(overrides)}: {reason}", flush=True)
    except Exception as e:  # the other points go on
        status, reason = Status.failed, f"{type(e).__name__}: {e}".splitlines()[0]
        print(f"failed {' '.join(overrides)}: {reason}", flush=True)
    point = Point(number, overrides, folder, status, reason, loss)
    path = sweep / "points" / f"{number:03d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(point) | {"status": status.value}, indent=1) + "\n")
    return math.inf if loss is None else loss


def summary(sweep: Path) -> list[str]:
    """What became of the points: how many of each, and of each that is not done why."""
    points = read(sweep)
    lines = [f"sweep {sweep}: {len(points)} points: {counted(points) or 'none was run'}"]
    return lines + [f"  {p.status.value} {' '.join(p.overrides)}: {p.reason}" for p in points if p.reason]


def begin(sweep: Path) -> None:
    """Forget what became of the points the last time."""
    for path in paths(sweep):
        path.unlink()


def _finished(cfg: Config) -> bool:
    """Whether the very same run has left its summary."""
    folder = cfg.run.folder
    if not (folder / "summary.json").exists():
        return False
    try:
        return configs.read(folder / "config.yaml", Config) == cfg
    except UserError:
        return False


def _loss(folder: Path) -> float | None:
    path = folder / "summary.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    losses = [s["nats_per_token"] for s in scores.values() if isinstance(s, dict)]
    return sum(losses) / len(losses) if losses else None
