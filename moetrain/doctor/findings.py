"""What a doctor finds: a level, what it is about, words for a reader, data for a program."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Level(Enum):
    ok = "ok"
    warning = "warning"  # slower than it could be, or soon to go wrong
    bad = "bad"  # do not train on it


@dataclass(frozen=True)
class Finding:
    level: Level
    what: str
    words: str
    data: Any = None

    def __str__(self) -> str:
        return f"{self.level.value:8} {self.what}: {self.words}"

    def encode(self) -> dict[str, Any]:
        return vars(self) | {"level": self.level.value}

    @staticmethod
    def decode(data: dict[str, Any]) -> "Finding":
        return Finding(Level(data["level"]), data["what"], data["words"], data["data"])


def ok(what: str, words: str, data: Any = None) -> Finding:
    return Finding(Level.ok, what, words, data)


def warning(what: str, words: str, data: Any = None) -> Finding:
    return Finding(Level.warning, what, words, data)


def bad(what: str, words: str, data: Any = None) -> Finding:
    return Finding(Level.bad, what, words, data)


def verdict(found: Iterable[Finding]) -> str:
    """The last line."""
    levels = [finding.level for finding in found]
    worst = [f"{n} {level.value}" for level in (Level.bad, Level.warning) if (n := levels.count(level))]
    return f"{len(levels)} findings: {', '.join(worst) if worst else 'all ok'}"


def size(n: float) -> str:
    """Bytes, or bytes a second, in words."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} bytes"
