"""The points of a sweep, as its folder keeps them: ``points/NUMBER.json`` says what became of each; and how a point's
overrides are said in short."""

import dataclasses
import json
import re
from enum import Enum
from pathlib import Path

import yaml

from moetrain.config import UserError


class Status(Enum):
    done = "done"
    skipped = "skipped"
    failed = "failed"


@dataclasses.dataclass(frozen=True)
class Point:
    """``loss`` is the mean held-out loss in nats a token; ``reason`` says in one line why there is none."""

    number: int
    overrides: list[str]
    folder: str
    status: Status
    reason: str = ""
    loss: float | None = None


def paths(sweep: Path) -> list[Path]:
    """The files of a sweep's points in the order of their numbers; none where there was no sweep."""
    return sorted((sweep / "points").glob("*.json"))


def read(sweep: Path) -> list[Point]:
    """The points of a sweep in the order of their numbers; raises ``UserError`` for a file that is none of them."""
    found = []
    for path in paths(sweep):
        try:
            data = json.loads(path.read_text())
            found.append(Point(**data | {"status": Status(data["status"])}))
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} is not a point of a sweep ({e}): take that file out") from e
    return found


def counted(points: list[Point]) -> str:
    """How many there are of each status, in words; nothing for none."""
    return ", ".join(f"{n} {status.value}" for status in Status if (n := sum(p.status is status for p in points)))


def leaves(overrides: list[str]) -> dict[str, str]:
    """Key -> value of each override; ``a={b:1,c:{d:2}}`` is two keys, a.b and a.c.d."""
    found = {}
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        found |= {".".join((key, *path)): leaf for path, leaf in _flat(value)}
    return found


def short(word: str) -> str:
    """An override as part of a folder's name: as it is, but for the braces of a mapping."""
    found = leaves([word])
    return word if len(found) == 1 else ",".join(f"{key.rpartition('.')[2]}={x}" for key, x in found.items())


def _flat(value: str) -> list[tuple[tuple[str, ...], str]]:
    """Hydra's ``{b:1,c:{d:2}}`` -> (("b",), "1"), (("c", "d"), "2"); anything else is one value."""
    try:
        tree = yaml.safe_load(re.sub(r":(?=\S)", ": ", value)) if value.startswith("{") else value
    except yaml.YAMLError:
        tree = value
    if not isinstance(tree, dict):
        return [((), value)]

    def walk(node: object, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
        if isinstance(node, dict) and node:
            return [found for key, child in node.items() for found in walk(child, (*path, str(key)))]
        words = yaml.safe_dump(node, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        return [(path, words.replace(", ", ","))]

    return walk(tree, ())
