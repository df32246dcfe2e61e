"""bfloat16: how far a layout is from float64, beside how far one rank is; both rounded, on the same choices.

A tolerance for rounded numbers is either loose or wrong, so one rank in bfloat16 is the measure: a layout may be
1.5 times as far from the float64 run. The errors compared are of the whole gradient and of each kind of parameter
(its name without the layer's number, all experts together): the ratio of two errors of a small tensor is noise.
A kind whose error is less than its share of a thousandth of the whole error is held against that.
"""

import math
from pathlib import Path

from moetrain.verify.choices import Choices
from moetrain.verify.compare import (
    FLOOR,
    Difference,
    Errors,
    Measured,
    Report,
    Row,
    buffers,
    kind,
    loads,
    measure,
    pairs,
    unmatched,
)
from moetrain.verify.outcome import Outcome

RATIO = 1.5
_ROUNDING = 2.0**-8  # of bfloat16: a sum of a few numbers may be this far off, and one rank's by luck nearer

_TIMES = "times one rank's"


def compare(layout: Path, alone: Path, exact: Path) -> Report:
    """``layout`` and ``alone`` computed in bfloat16, ``exact`` in float64, all on the choices of ``exact``."""
    a, s, b = Outcome(layout), Outcome(alone), Outcome(exact)
    rows = [_number(name, a, s, want) for name, want in b.numbers.items()]
    rows += loads(a, b)
    if lacking := unmatched(a, b):
        rows.append(Row("tensors", len(b.index), math.inf, lacking, False))
    far, near = _errors("gradients", a, b, "grad."), _errors("gradients", s, b, "grad.")
    ratios = _by_kind(far, near)
    worst, where = max((ratio, kind) for kind, ratio in ratios.items())
    rows.append(Row("gradients, all", len(far.measured), _whole(far, near), _TIMES, _whole(far, near) <= RATIO))
    rows.append(Row("gradients", len(ratios), worst, f"{_TIMES}: {where}", worst <= RATIO))
    moved = _whole(_errors("next weights", a, b, "weight."), _errors("next weights", s, b, "weight."))
    rows += [Row("next weights, all", len(far.measured), moved, _TIMES, moved <= RATIO), *buffers(a, b, _ROUNDING)]
    groups = a.meta["summed_over"]
    different = [
        Difference(m.name, "", ratios[kind(m.name)], groups.get(m.name, "?"))
        for m in far.measured
        if not ratios[kind(m.name)] <= RATIO
    ]
    return Report(tuple(rows), Choices(0), tuple(different), groups)


def _number(name: str, a: Outcome, s: Outcome, want: float) -> Row:
    """Relative error against 1.5 times one rank's, or against bfloat16's own rounding where that is more."""
    if name == "dropped":
        return Row(name, 1, abs(a.numbers[name] - want), "", a.numbers[name] == want)
    size = max(abs(want), 1e-30)
    error, single = abs(a.numbers[name] - want) / size, abs(s.numbers[name] - want) / size
    return Row(name, 1, error, f"one rank's {single:.1e}", error <= RATIO * max(single, _ROUNDING))


def _errors(quantity: str, a: Outcome, b: Outcome, prefix: str) -> Errors:
    return Errors(quantity, [measure(pair) for pair in pairs(a, b, prefix)])


def _distance(measured: list[Measured]) -> float:
    if any(m.lost_zero_G.any() for m in measured):
        return math.inf
    return math.sqrt(sum(m.far_G.square().sum().item() for m in measured))


def _whole(far: Errors, near: Errors) -> float:
    return _ratio(_distance(far.measured), _distance(near.measured))


def _by_kind(far: Errors, near: Errors) -> dict[str, float]:
    """Kind -> the layout's error over one rank's, less what chance adds: of n elements, such a ratio scatters by
    1 / sqrt(n), and twice that is allowed for."""
    whole = _distance(near.measured)
    found = {}
    for name in dict.fromkeys(kind(m.name) for m in far.measured):
        mine, theirs = ([m for m in errors.measured if kind(m.name) == name] for errors in (far, near))
        numel = sum(m.numel * len(m.size_G) for m in mine)
        floor = FLOOR * whole * math.sqrt(numel / max(1, far.numel))
        found[name] = _ratio(_distance(mine), max(_distance(theirs), floor)) / (1 + 2 / math.sqrt(numel))
    return found


def _ratio(a: float, b: float) -> float:
    if a == 0:
        return 0.0
    return a / b if b > 0 and math.isfinite(a) and math.isfinite(b) else math.inf
