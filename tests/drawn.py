"""Of many cases a few, others at each commit, so that over time all of them run; MOETRAIN_TESTS=all runs all."""

import os
import random
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypeVar

ALL = os.environ.get("MOETRAIN_TESTS") == "all"


@cache
def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return os.environ.get("GIT_COMMIT") or found.stdout.strip() or "no commit"


T = TypeVar("T")


def drawn(cases: Iterable[T], few: int, *, of: str) -> list[T]:
    """In their order. ``of`` names what they are, so that other tests' draws are others."""
    every = list(cases)
    if ALL:
        return every
    chosen = set(random.Random(f"{commit()} {of}").sample(range(len(every)), few))
    return [case for i, case in enumerate(every) if i in chosen]
