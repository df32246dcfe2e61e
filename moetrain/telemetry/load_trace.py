"""``loads.jsonl``: what every expert got in every step of a run, recorded and read.

The first line is a header: format, version, ``layers`` (numbers of the MoE layers in the model), of each its
``experts`` and ``top_k``, and ``tokens`` of a whole step. Then one line a step: {"step": s, "load": [[...], ...]},
assignments of each expert of each layer over all ranks; of zero-computation experts nothing, which no rank holds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.config import UserError
from moetrain.moe.layer import MoEConfig
from moetrain.telemetry.sinks import Series

NAME = "loads.jsonl"
FORMAT, VERSION = "moetrain-loads", 1
_LARGEST = 2**53  # a whole number above it is no count


class LoadTrace:
    """Writes the trace of a run; a resumed run continues it."""

    def __init__(self, folder: Path, moes: Mapping[int, MoEConfig], *, tokens: int, resume_at: int) -> None:
        """``moes``: layer -> that of each MoE layer. ``tokens``: of a step."""
        self._experts = [moe.num_experts for moe in moes.values()]
        header = {
            "format": FORMAT, "version": VERSION, "layers": list(moes), "experts": self._experts,
            "top_k": [moe.router.top_k for moe in moes.values()], "tokens": tokens,
        }  # fmt: skip
        self._series = Series(folder / NAME, resume_at=resume_at, header=header)

    def write(self, steps: list[int], loads: list[Tensor]) -> None:
        """A (L, E) int64 load of each step, on any device; one copy to the host."""
        rows = torch.stack(loads).tolist()
        self._series.write(
            [
                {"step": step, "load": [row[:E] for row, E in zip(load, self._experts, strict=True)]}
                for step, load in zip(steps, rows, strict=True)
            ]
        )

    def close(self) -> None:
        self._series.close()


@dataclass(frozen=True)
class Recorded:
    """A trace that was read."""

    layers: list[int]  # numbers of the MoE layers in the model
    top_k: list[int]
    tokens: int  # of a whole step
    steps: list[int]
    loads: list[Tensor]  # of each layer (steps, E) float64 assignments


def read(path: Path) -> Recorded:
    """The trace at ``path``, a file or the folder of a run; raises ``UserError`` for what is none.

    A last line without its end is left out: the run may be writing it.
    """
    path = path / NAME if path.is_dir() else path
    try:
        with path.open() as file:
            lines = [line for line in file if line.endswith("\n")]
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not text"
        raise UserError(
            f"trace={path} cannot be read ({why}): name a {NAME} or the folder of a run with logging.load_trace=true"
        ) from e
    head = _header(path, lines[0] if lines else "")
    steps, rows = [], []
    for number, line in enumerate(lines[1:], 2):
        step, load = _record(path, number, line, head["experts"], after=steps[-1] if steps else 0)
        steps.append(step)
        rows.append(load)
    if not steps:
        raise UserError(f"trace={path} has a header and no step yet: let the run reach its first logging step")
    loads = [torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(len(head["layers"]))]
    return Recorded(head["layers"], head["top_k"], head["tokens"], steps, loads)


def _header(path: Path, line: str) -> dict[str, Any]:
    data = _json(line)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(
            f"trace={path} is no load trace: no format {FORMAT!r} in its first line; logging.load_trace=true writes one"
        )
    if data.get("version") != VERSION:
        raise UserError(f"trace={path} has version {data.get('version')!r}, this moetrain reads {VERSION}: record anew")
    lists = [data.get(key) for key in ("layers", "experts", "top_k")]
    whole = all(isinstance(x, list) and x and all(_count(n) for n in x) for x in lists)
    if not whole or len({len(x or []) for x in lists}) != 1 or not _count(data.get("tokens")) or 0 in data["experts"]:
        raise UserError(f"trace={path}, line 1: the header is damaged: record anew with logging.load_trace=true")
    return data


def _record(path: Path, number: int, line: str, experts: list[int], *, after: int) -> tuple[int, list[list[int]]]:
    """(step, load of each expert of each layer) of one line."""
    data = _json(line)
    step, load = (data.get("step"), data.get("load")) if isinstance(data, dict) else (None, None)
    shaped = isinstance(load, list) and all(isinstance(x, list) for x in load) and [len(x) for x in load] == experts
    if not _count(step) or not shaped or not all(_count(n) for row in load or [] for n in row):
        raise UserError(
            f"trace={path}, line {number}: damaged, it is not a step and the loads of {experts} experts: cut the file "
            f"before that line, or record anew"
        )
    assert isinstance(step, int)
    assert isinstance(load, list)
    if step <= after:
        raise UserError(
            f"trace={path}, line {number}: step {step} after step {after}: record anew, in a folder of its own"
        )
    return step, load


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < _LARGEST
