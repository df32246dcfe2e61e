"""A sweep as groups of finished runs that differ by their seed alone, each with the numbers that a report compares."""

import dataclasses
import re
from pathlib import Path

from moetrain import config as configs
from moetrain.config import UserError
from moetrain.job import Config
from moetrain.report.points import Point, Status, counted, leaves, read
from moetrain.report.read import History, history
from moetrain.report.stats import Difference, mean, median, paired

LAST = 50
"""Last steps that a run's numbers are of."""

MOST = 30
"""Groups in a picture: of more, those of the lowest training loss."""

_SEED = re.compile(r"\+*seed=")
_WORD = re.compile(r"[A-Za-z_][\w./-]*")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished run. ``*_L`` are one number a MoE layer, empty where the run recorded no health."""

    point: Point
    cfg: Config
    history: History
    loss: float  # training, mean of the last steps
    held_out: float | None
    logged: int  # logging steps among them
    per_step_L: list[float]  # max violation, mean over the logging steps among them
    summed_L: list[float]  # max violation of the load summed over these, as far as metrics.jsonl has it: 2 digits
    drop_rate: float  # dropped / (tokens * top_k * MoE layers) of them
    tokens_per_second: float | None  # median over the whole run

    @property
    def seed(self) -> int:
        return self.cfg.seed

    @property
    def violation(self) -> float | None:
        return mean(self.per_step_L) if self.per_step_L else None

    @property
    def violation_worst(self) -> float | None:
        return max(self.per_step_L, default=None)

    @property
    def summed(self) -> float | None:
        return mean(self.summed_L) if self.summed_L else None

    @property
    def summed_worst(self) -> float | None:
        return max(self.summed_L, default=None)


@dataclasses.dataclass(frozen=True)
class Group:
    """``label``: the overrides that differ between groups, in short."""

    label: str
    overrides: tuple[str, ...]
    trials: list[Trial]  # at least one

    def of_seed(self, name: str) -> dict[int, float]:
        """Seed -> a number of its trial, where that is known."""
        found = {trial.seed: getattr(trial, name) for trial in self.trials}
        return {seed: x for seed, x in found.items() if x is not None}


@dataclasses.dataclass(frozen=True)
class Sweep:
    folder: Path
    points: list[Point]
    groups: list[Group]  # in the order of their first points
    left_out: list[tuple[Point, str]]  # those that are in no group, and why
    last: int

    @property
    def trials(self) -> list[Trial]:
        return [trial for group in self.groups for trial in group.trials]

    def group(self, name: str) -> Group:
        """By its label, or by overrides that only it has; raises ``UserError`` for a name of none or of several."""
        words = set(name.split())
        exact = [g for g in self.groups if name == g.label or words == set(g.overrides)]
        found = exact or [g for g in self.groups if words and words <= {*g.overrides, *g.label.split()}]
        if len(found) == 1:
            return found[0]
        labels = ", ".join(g.label for g in found or self.groups)
        says = f"fits several groups of {self.folder}" if found else f"is no group of {self.folder}"
        raise UserError(f"--against {name!r} {says}: use one of {labels}")


def sweep(folder: Path, *, last: int = LAST) -> Sweep:
    """Read a sweep's folder; raises ``UserError`` where none of its points is finished."""
    points = read(folder)
    finished: dict[tuple[str, ...], list[Trial]] = {}
    left_out = []
    for point in points:
        if point.status is not Status.done:
            left_out.append((point, point.reason))
            continue
        overrides = tuple(word for word in point.overrides if not _SEED.match(word))
        try:
            finished.setdefault(overrides, []).append(_trial(folder, point, last))
        except UserError as e:
            left_out.append((point, str(e)))
    finished = {overrides: trials for overrides, trials in finished.items() if trials}
    if not finished:
        first = f"; the first: {left_out[0][1]}" if left_out else ""
        raise UserError(f"{folder} is a sweep without a finished point ({counted(points)}){first}")
    labels = _labels(list(finished))
    groups = [Group(labels[key], key, sorted(x, key=lambda t: t.seed)) for key, x in finished.items()]
    return Sweep(folder, points, groups, left_out, last)


def differences(found: Sweep, baseline: Group, name: str) -> dict[str, Difference | None]:
    """Label -> how a group's ``name`` differs from the baseline's, of every other group."""
    base = baseline.of_seed(name)
    return {g.label: paired(g.of_seed(name), base) for g in found.groups if g is not baseline}


def _trial(sweep: Path, point: Point, last: int) -> Trial:
    folder = _folder(sweep, point)
    cfg = configs.read(folder / "config.yaml", Config)
    found = history(folder, cfg.model.moe_layers, over=last)
    logged = [i for i, step in enumerate(found.logged) if step > found.steps[-1] - last]
    violations = [found.health["max_violation"][i] for i in logged]
    whole = found.neighbours == 1  # else the load is known of runs of experts only
    assignments = sum(found.tokens[-last:]) * sum(moe.router.top_k for moe in cfg.model.moe_configs)
    return Trial(
        point, cfg, found,
        loss=mean(found.loss[-last:]), held_out=point.loss, logged=len(logged),
        per_step_L=[mean(list(x)) for x in zip(*violations, strict=True)],
        summed_L=[max(load_E) - 1 for load_E in found.load_LE] if whole and logged else [],
        drop_rate=sum(found.dropped[-last:]) / max(1, assignments),
        tokens_per_second=median(found.tokens_per_second) if found.tokens_per_second else None,
    )  # fmt: skip


def _folder(sweep: Path, point: Point) -> Path:
    """A point's run: in the sweep's folder, wherever that has been moved to since."""
    parts = Path(point.folder).parts
    for i, part in enumerate(parts):
        if part.startswith(f"{point.number:03d}-") and (sweep / Path(*parts[i:])).is_dir():
            return sweep / Path(*parts[i:])
    return Path(point.folder)


def _labels(groups: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Overrides -> those that differ between groups, by the end of their key; alone the value where that will do."""
    found = {group: leaves(list(group)) for group in groups}
    values: dict[str, set[str | None]] = {}
    for key in {key for leaf in found.values() for key in leaf}:
        values[key] = {leaf.get(key) for leaf in found.values()}
    differ = {key for key, seen in values.items() if len(seen) > 1}
    if len(groups) == 1:
        return {group: " ".join(group) or "as configured" for group in groups}
    if len(differ) == 1:
        (key,) = differ
        if all(value and _WORD.fullmatch(value) for value in values[key]):
            return {group: leaf[key] for group, leaf in found.items()}
    last = [key.rpartition(".")[2] for key in differ]
    words = {key: key if last.count(key.rpartition(".")[2]) > 1 else key.rpartition(".")[2] for key in differ}
    return {
        group: " ".join(f"{words[key]}={x}" for key, x in leaf.items() if key in differ) or "as configured"
        for group, leaf in found.items()
    }
