"""The folder that all ranks write to: whether they see each other's files, how soon, and by what clock."""

import shutil
import time
from pathlib import Path
from typing import Any

from moetrain.doctor.findings import Finding, bad, ok, warning

CLOCK = 30.0
"""Seconds between a host's clock and the storage's that are too many."""


def begin(folder: Path) -> dict[str, Any]:
    """Make the folder and rank 0's file; by rank 0."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(folder, 0)
    except OSError as error:
        return {"error": f"{folder} cannot be made ({error.strerror})"}


def answer(folder: Path, rank: int, *, wait: float) -> dict[str, Any]:
    """By another rank, after rank 0: wait until its file is seen, write one. An ``error``, or when."""
    since = time.monotonic()
    while not _seen(folder, 0):
        if time.monotonic() - since > wait:
            return {"error": f"does not see {folder.absolute()}/rank-0, which rank 0 wrote {wait:.0f} s ago"}
        time.sleep(0.05)
    return _write(folder, rank) | {"seconds": time.monotonic() - since}


def end(folder: Path, answers: list[dict[str, Any]], *, wait: float) -> list[Finding]:
    """By rank 0, after the others: see their files, remove the folder, judge."""
    until, unseen = time.monotonic() + wait, {r for r, it in enumerate(answers) if "clock" in it}
    while unseen := {r for r in unseen if not _seen(folder, r)}:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    errors = {r: it["error"] for r, it in enumerate(answers) if "error" in it}
    errors |= {r: f"wrote a file to {folder} that rank 0 does not see after {wait:.0f} s" for r in sorted(unseen)}
    shutil.rmtree(folder, ignore_errors=True)
    if errors:
        first, words = next(iter(errors.items()))
        more = f"; likewise rank {', '.join(map(str, list(errors)[1:]))}" if len(errors) > 1 else ""
        advice = "set run.dir to a folder that all nodes share and all ranks can write to"
        return [bad("shared storage", f"rank {first} {words}{more}: {advice}", {"errors": errors})]
    data = {"answers": answers}
    slowest, ahead = max(it.get("seconds", 0.0) for it in answers), max(answers, key=lambda it: abs(it["clock"]))
    words = f"{folder.parents[1]}: every rank sees rank 0's file within {slowest:.2f} s, rank 0 theirs"
    if abs(ahead["clock"]) > CLOCK:
        rank = answers.index(ahead)
        return [warning("shared storage", f"{words}; rank {rank}'s clock is {ahead['clock']:+.0f} s off the storage's: "
                        f"run chrony or ntpd", data)]  # fmt: skip
    return [ok("shared storage", f"{words}; clocks within {abs(ahead['clock']):.1f} s of the storage's", data)]


def _write(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"rank-{rank}"
    try:
        path.write_text(f"{rank}\n")
        return {"clock": time.time() - path.stat().st_mtime}
    except OSError as error:
        return {"error": f"cannot write {path} ({error.strerror})"}


def _seen(folder: Path, rank: int) -> bool:
    try:
        return (folder / f"rank-{rank}").read_text() == f"{rank}\n"
    except OSError:
        return False
