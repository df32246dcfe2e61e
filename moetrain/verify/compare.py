"""Two outcomes of one step -> what differs, tensor by tensor. The measure of the whole package; pure, alone.

    err(p) = ||a - b|| / max(||b||, 1e-3 * ||g|| * sqrt(numel_p / numel_all))

per parameter, of experts per expert id; b is the reference's, g all of the reference's gradient. The floor keeps
a parameter whose gradient is rounding noise (a key's bias, say) from being compared with itself. What is zero in
the reference, row by row, is zero: an expert that nobody chose, a token that nobody wrote.

Letters: G parts of a parameter (its experts, else one), R rows of a part, C columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moetrain.verify import choices
from moetrain.verify.choices import Choices
from moetrain.verify.outcome import Outcome

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
FLOOR = 1e-3
NOISE = 1e2
"""Adam's first update of an element is about lr * sign(gradient), so an element whose gradient is not known to its
sign says nothing about the next weights: those below NOISE * tolerance * rms(gradient of the part) are left out."""

_AT_ONCE = 2**28  # bytes of one outcome's tensors in memory
_BLOCK = 2**24  # elements that are worked on at a time


@dataclass(frozen=True)
class Row:
    """A line of the table. ``worst`` is an error by the measure above, a ratio, or a number of assignments."""

    quantity: str
    compared: int
    worst: float
    where: str
    same: bool


@dataclass(frozen=True)
class Difference:
    """A parameter whose gradient differs; ``part``: which of its experts is the worst, or nothing."""

    name: str
    part: str
    error: float
    summed_over: str


@dataclass(frozen=True)
class Report:
    """``differences`` are in the order of the model; ``summed_over``: parameter -> who its gradient is summed over."""

    rows: tuple[Row, ...]
    choices: Choices
    differences: tuple[Difference, ...]
    summed_over: dict[str, str]

    @property
    def same(self) -> bool:
        return all(row.same for row in self.rows)

    @property
    def worst(self) -> float:
        """Of the gradients."""
        return max((row.worst for row in self.rows if row.quantity == "gradients"), default=math.inf)


def compare(other: Path, reference: Path, *, tolerance: float | None = None, free: Choices | None = None) -> Report:
    """``free``: what was found before ``other`` ran again on the reference's choices (choices.py); None: it did not.

    ``tolerance``: by dtype unless given.
    """
    a, b = Outcome(other), Outcome(reference)
    limit = TOLERANCE[b.meta["dtype"]] if tolerance is None else tolerance
    chosen = choices.compare(a, b, replayed=free is not None)
    if free is not None:
        chosen = replace(
            chosen, near_ties=max(free.near_ties, chosen.near_ties), widest=max(free.widest, chosen.widest)
        )
    table = [_choices_row(chosen, replayed=free is not None)]
    if b.layers and chosen.wrong is None:
        table.append(_scores(a, b, limit))
    table += [*numbers(a, b, limit), *loads(a, b)]
    if lacking := unmatched(a, b):
        table.append(Row("tensors", len(b.index), math.inf, lacking, False))
    gradients = Errors("gradients", [measure(pair) for pair in pairs(a, b, "grad.")])
    # A row whose gradient is zero is moved by weight decay alone, exactly: it is looked at too.
    moved = [measure(pair, noise=NOISE * limit) for pair in pairs(a, b, "weight.", beside="grad.")]
    weights = Errors("next weights", moved)
    table += [gradients.row(limit), weights.row(limit), *buffers(a, b, limit)]
    groups = a.meta["summed_over"]
    return Report(tuple(table), chosen, tuple(gradients.differences(limit, groups)), groups)


def unmatched(a: Outcome, b: Outcome) -> str:
    """A tensor that only one has, or that is of another shape; else nothing."""
    for name in sorted(a.index.keys() ^ b.index.keys()):
        return f"{name} is only in the {'reference' if name in b.index else 'layout'}"
    return next((f"{n}: {list(a.index[n][0])} against {list(b.index[n][0])}" for n in b.index if _odd(a, b, n)), "")


def _odd(a: Outcome, b: Outcome, name: str) -> bool:
    return name in a.index and a.index[name][0] != b.index[name][0]


def _choices_row(chosen: Choices, *, replayed: bool) -> Row:
    ties = f"{chosen.near_ties} near-tie{'s' * (chosen.near_ties != 1)}, {'' if replayed else 'not '}replayed"
    if chosen.wrong is None:
        return Row("choices", chosen.tokens, chosen.widest, ties if chosen.near_ties else "", True)
    return Row("choices", chosen.tokens, chosen.gap, f"{chosen.wrong}: a gap of {chosen.gap:.1e}", False)


def _scores(a: Outcome, b: Outcome, limit: float) -> Row:
    found = []
    for layer in b.layers:
        (_, got), (_, want) = a.choices(layer), b.choices(layer)
        found.append((_ratio((got - want).norm().item(), want.norm().item()), f"layer {layer}"))
    return _row("scores", found, limit)


def numbers(a: Outcome, b: Outcome, limit: float) -> list[Row]:
    """Loss, gradient norm, balance losses, dropped assignments."""
    rows = []
    for name, want in b.numbers.items():
        error = _ratio(abs(a.numbers.get(name, math.nan) - want), abs(want))
        rows.append(Row(name, 1, error, "", error <= (0 if name == "dropped" else limit)))
    return rows


def loads(a: Outcome, b: Outcome) -> list[Row]:
    """Assignments per expert and layer, which are counts: equal or not."""
    names = [n for n in b.index if n.startswith("load.") and n in a.index and not _odd(a, b, n)]
    if not names:
        return []
    got, want = a.read(names), b.read(names)
    found = [(float((got[n] - want[n]).abs().max()), f"layer {n.removeprefix('load.')}") for n in names]
    return [_row("expert load", found, 0.0)]


def buffers(a: Outcome, b: Outcome, limit: float) -> list[Row]:
    """The expert bias after the step, and whatever else is saved."""
    found: dict[str, list[tuple[float, str]]] = {}
    for pair in pairs(a, b, "buffer."):
        error = max(_farthest(got, pair.want) for got in pair.got)
        quantity = "expert bias" if pair.name.endswith(".bias_E") else "buffers"
        found.setdefault(quantity, []).append((error, pair.name))
    return [_row(quantity, errors, limit) for quantity, errors in found.items()]


def _farthest(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    return _ratio((got.double() - want.double()).abs().max().item(), want.abs().max().item())


@dataclass(frozen=True)
class Pair:
    """A tensor of two outcomes. ``got`` has more than one version where ranks that should hold the same do not."""

    name: str
    got: tuple[Tensor, ...]
    want: Tensor
    beside: Tensor

    @property
    def parts(self) -> int:
        return self.want.shape[0] if is_experts(self.name) else 1


@dataclass(frozen=True)
class Measured:
    """One parameter: ||a - b||, ||b|| and whether a zero was lost, a part each."""

    name: str
    far_G: Tensor
    size_G: Tensor
    lost_zero_G: Tensor
    numel: int  # of a part

    def part(self, g: int) -> str:
        return f"expert {g}" if is_experts(self.name) else ""


class Errors:
    """The errors of one kind of tensor over all parameters, once the size of the whole is known."""

    def __init__(self, quantity: str, measured: list[Measured]) -> None:
        self.quantity, self.measured = quantity, measured
        self.whole = math.sqrt(sum(m.size_G.square().sum().item() for m in measured))
        self.numel = sum(m.numel * len(m.size_G) for m in measured)

    def error(self, m: Measured) -> tuple[float, str]:
        """Of the worst part; infinite where a zero was lost or a number is none."""
        floor = FLOOR * self.whole * math.sqrt(m.numel / max(1, self.numel))
        error_G = torch.where(m.far_G == 0, 0.0, m.far_G / m.size_G.clamp_min(floor))
        error_G = error_G.masked_fill(m.lost_zero_G | error_G.isnan(), math.inf)
        g = int(error_G.argmax())
        return error_G[g].item(), m.part(g)

    def row(self, limit: float) -> Row:
        found = [(error, f"{m.name} {part}".strip()) for m in self.measured for error, part in [self.error(m)]]
        return _row(self.quantity, found, limit)

    def differences(self, limit: float, summed_over: dict[str, str]) -> Iterator[Difference]:
        for m in self.measured:
            error, part = self.error(m)
            if not error <= limit:
                yield Difference(m.name, part, error, summed_over.get(m.name, "?"))


def kind(name: str) -> str:
    """A parameter's name without the number of its layer."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


def is_experts(name: str) -> bool:
    return ".moe.experts." in name


def measure(pair: Pair, *, noise: float | None = None) -> Measured:
    """``noise``: look only at elements whose ``beside`` is above it, times its rms in the part, or in a row of zeros.

    A block at a time: the largest parameters are a good part of a machine's memory.
    """
    want_GRC, got = rows(pair.want, pair.parts), [rows(version, pair.parts) for version in pair.got]
    beside_GRC = rows(pair.beside, pair.parts)
    G, numel = len(want_GRC), want_GRC[0].numel()
    floor_G = (noise or 0.0) * norm(beside_GRC) / math.sqrt(max(1, numel))
    far_VG, size_G = torch.zeros(len(got), G, dtype=torch.float64), torch.zeros(G, dtype=torch.float64)
    lost_G = torch.zeros(G, dtype=torch.bool)
    for part, row in blocks(want_GRC):
        want = want_GRC[part, row]
        zero = want == 0
        keep = torch.ones_like(zero)
        if noise is not None:
            size = beside_GRC[part, row].abs()
            keep = (size > floor_G[part, None, None]) | (size == 0).all(-1, keepdim=True)
        size_G[part] += norm(want * keep).square()
        for v, version in enumerate(got):
            away = torch.where(keep, version[part, row] - want, 0)
            lost_G[part] |= (zero.all(-1) & (away != 0).any(-1)).any(-1)
            far_VG[v, part] += norm(away).square()
    return Measured(pair.name, far_VG.amax(0).sqrt(), size_G.sqrt(), lost_G, numel)


def blocks(x_GRC: Tensor) -> Iterator[tuple[slice, slice]]:
    """(parts, rows) of pieces of a parameter: whole parts, or rows of one part where that is large."""
    G, R, C = x_GRC.shape
    some = max(1, _BLOCK // max(1, R * C))
    step = R if R * C <= _BLOCK else max(1, _BLOCK // C)
    for g in range(0, G, some):
        for r in range(0, R, max(1, step)):
            yield slice(g, g + some), slice(r, r + step)


def norm(x_GRC: Tensor) -> Tensor:
    """(G,) float64."""
    return torch.linalg.vector_norm(x_GRC.flatten(1), dim=1, dtype=torch.float64)


def rows(x: Tensor, parts: int) -> Tensor:
    """(...) -> (G, R, C): what a part is made of; a vector is one row."""
    return x.reshape(parts, -1, x.shape[-1]) if x.dim() > 1 else x.reshape(parts, 1, -1)


def pairs(a: Outcome, b: Outcome, prefix: str, *, beside: str = "") -> Iterator[Pair]:
    """What both have under ``prefix``, in the order of the model; ``beside`` is another prefix, of b's to read too."""
    parameters = {f"{prefix}{n}": None for n in b.parameters}
    ordered = [*parameters, *(n for n in sorted(b.index) if n.startswith(prefix) and n not in parameters)]
    names = [n for n in ordered if n in a.index and n in b.index and not _odd(a, b, n)]
    for some in batches(b, names):
        also = {n: (beside or prefix) + n.removeprefix(prefix) for n in some}
        got, want = a.read(some), b.read([*{*some, *also.values()}])
        for name in some:
            torn = [_with(got[name], offsets, box) for _, offsets, box in a.replicas.get(name, ())]
            yield Pair(name.removeprefix(prefix), (got[name], *torn), want[name], want[also[name]])


def batches(outcome: Outcome, names: list[str]) -> Iterator[list[str]]:
    """Runs of names that fit into memory together."""
    some, held = [], 0
    for name in names:
        shape, dtype = outcome.index[name]
        size = math.prod(shape) * dtype.itemsize
        if some and held + size > _AT_ONCE:
            yield some
            some, held = [], 0
        some, held = [*some, name], held + size
    if some:
        yield some


def _with(whole: Tensor, offsets: tuple[int, ...], box: Tensor) -> Tensor:
    changed = whole.clone()
    changed[tuple(slice(o, o + n) for o, n in zip(offsets, box.shape, strict=True))] = box
    return changed


def _ratio(far: float, size: float) -> float:
    """far / size; 0 where nothing is far, infinite where that is more than nothing, or no number."""
    if far == 0:
        return 0.0
    return far / size if size > 0 and math.isfinite(far) else math.inf


def _row(quantity: str, found: list[tuple[float, str]], limit: float) -> Row:
    worst, where = max(found, default=(0.0, ""), key=lambda item: item[0])
    return Row(quantity, len(found), worst, where if worst else "", worst <= limit)
