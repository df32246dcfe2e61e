"""What every benchmark says at its start and its end, and where its figures go."""

import json
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import moetrain


def begin(what: str, **more: Any) -> dict[str, Any]:
    """A report, its first lines printed."""
    report = {
        "what": what, **more, "date": date.today().isoformat(), "cores": len(os.sched_getaffinity(0)),
        "versions": {"moetrain": moetrain.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "load_average": os.getloadavg(),
    }  # fmt: skip
    print(*(f"{k}: {v}" for k, v in report.items()), sep="\n")
    return report


def end(report: dict[str, Any], path: Path, *, began: float, write: bool) -> None:
    """``began``: by ``time.monotonic``."""
    report["load_average_after"] = os.getloadavg()
    print(f"\n{time.monotonic() - began:.0f} s, load average after: {report['load_average_after']}")
    if write:
        save(report, path)


def save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {os.path.relpath(path)}")
