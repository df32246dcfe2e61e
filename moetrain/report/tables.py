"""What a sweep came to, as rows of words (for a page and for Markdown) and of numbers (CSV)."""

import csv
import io
from dataclasses import dataclass

from moetrain.model.flops import size
from moetrain.report.points import counted
from moetrain.report.stats import Difference, mean, spread
from moetrain.report.trials import Group, Sweep, differences

LOSSES = {"loss": "training loss", "held_out": "held-out loss"}


@dataclass(frozen=True)
class Measure:
    name: str  # of a Trial
    title: str
    form: str
    spread: bool = False


MEASURES = (
    Measure("loss", "training loss", ".4f", spread=True),
    Measure("held_out", "held-out loss", ".4f", spread=True),
    Measure("violation", "max violation, mean", ".3f"),
    Measure("violation_worst", "worst layer", ".3f"),
    Measure("summed", "of summed load, mean", ".3f"),
    Measure("summed_worst", "worst layer", ".3f"),
    Measure("drop_rate", "dropped", ".2%"),
    Measure("tokens_per_second", "tokens/s", ",.0f"),
)


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]  # the first cell of each is the group
    kind: str = "words"  # a class of the page's style

    def markdown(self) -> str:
        lines = [self.head, ["---", *["--:"] * (len(self.head) - 1)], *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def of_groups(found: Sweep) -> Table:
    """A row a group: means over its seeds; of the losses their sample standard deviation too."""
    sizes = {str(size(trial.cfg.model)) for trial in found.trials}
    several = len(sizes) > 1
    head = ["group", *(["parameters", "active"] if several else []), "seeds", *(m.title for m in MEASURES)]
    rows = []
    for group in found.groups:
        count = size(group.trials[0].cfg.model)
        sized = [f"{count.total / 1e6:,.2f}M", f"{count.active / 1e6:,.2f}M"] if several else []
        rows.append([group.label, *sized, str(len(group.trials)), *(_cell(group, m) for m in MEASURES)])
    return Table(head, rows)


def against(found: Sweep, baseline: Group) -> Table:
    """A row a group but the baseline: the differences of its losses, paired by seed."""
    head = ["group", "seeds"]
    for title in LOSSES.values():
        head += [f"{title}, difference", "95% interval", "in words"]
    rows: dict[str, list[str]] = {g.label: [g.label] for g in found.groups if g is not baseline}
    for name in LOSSES:
        known = {g.label for g in found.groups if g.of_seed(name)}
        for label, difference in differences(found, baseline, name).items():
            if len(rows[label]) == 1:
                rows[label].append(str(difference.seeds if difference else 0))
            rows[label] += _words(difference, measured={label, baseline.label} <= known)
    return Table(head, list(rows.values()))


def not_counted(found: Sweep) -> Table:
    """A row a point that is in no group, and why."""
    rows = [[" ".join(point.overrides), point.status.value, reason] for point, reason in found.left_out]
    return Table(["point", "status", "reason"], rows, "lines")


def facts(found: Sweep) -> list[str]:
    """What was run, in short."""
    steps = [len(trial.history.steps) for trial in found.trials]
    tokens = [sum(trial.history.tokens) for trial in found.trials]
    sizes = sorted({str(size(trial.cfg.model)) for trial in found.trials})
    seconds = sum(trial.history.seconds for trial in found.trials)
    return [
        f"{len(found.points)} points: {counted(found.points)}",
        f"{_range(steps)} steps, {_range(tokens)} tokens each",
        *(sizes if len(sizes) == 1 else []),
        f"{seconds / 3600:.1f} hours of steps" if seconds >= 3600 else f"{seconds / 60:.1f} minutes of steps",
    ]


def markdown(found: Sweep, baseline: Group) -> str:
    """table.md: all tables and what their columns mean."""
    parts = [f"{'; '.join(facts(found))}.\n", of_groups(found).markdown(), "".join(f"- {x}.\n" for x in notes(found))]
    if len(found.groups) > 1:
        parts += [f"Against {baseline.label}:\n", against(found, baseline).markdown(), comparison_note(baseline) + "\n"]
    if found.left_out:
        parts += ["Not counted:\n", not_counted(found).markdown()]
    return "\n".join(parts)


def notes(found: Sweep) -> list[str]:
    """What the columns mean, a sentence each."""
    short = sum(len(trial.history.steps) < found.last for trial in found.trials)
    logged = _range([trial.logged for trial in found.trials])
    return [
        f"training loss: mean of the last {found.last} steps of a run"
        + (f" ({short} runs are shorter: all their steps)" if short else "")
        + "; held-out loss: at its end. Nats a token, mean over seeds ± sample standard deviation over seeds",
        "max violation: max load / mean load - 1 of a step, before drops, mean over the steps that were logged among "
        f"the last {found.last} ({logged} of them), then mean over layers, or that of a seed's worst layer; mean over "
        "seeds",
        "of summed load: the same of the load summed over these steps: an expert that is always hot stays hot, the "
        "noise of single batches goes",
        f"dropped: share of the assignments (tokens x top_k x MoE layers) of the last {found.last} steps",
        "tokens/s: median over steps",
    ]


def comparison_note(baseline: Group) -> str:
    return (
        f"Differences from {baseline.label}, paired by seed; intervals are Student's t with one degree less than "
        "seeds. 'lower' and 'higher' where the interval excludes 0; each stands alone, so that of twenty comparisons "
        "of what does not differ one is expected to."
    )


def as_csv(found: Sweep, baseline: Group) -> str:
    """A line a group, every number of it in full."""
    text = io.StringIO()
    head = ["group", "overrides", "seeds", "parameters", "active"]
    head += [column for m in MEASURES for column in (m.name, f"{m.name}_std")]
    ends = ("difference", "low", "high", "verdict")
    head += ["against", *(f"{name}_{end}" for name in LOSSES for end in ends)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    compared = {name: differences(found, baseline, name) for name in LOSSES}
    for group in found.groups:
        count = size(group.trials[0].cfg.model)
        seeds = " ".join(str(trial.seed) for trial in group.trials)
        row: list[object] = [group.label, " ".join(group.overrides), seeds, count.total, count.active]
        for m in MEASURES:
            values = list(group.of_seed(m.name).values())
            row += [mean(values) if values else None, spread(values) if values else None]
        row.append(baseline.label)
        for name in LOSSES:
            d = compared[name].get(group.label)
            half = d.half if d else None
            row += [d.mean if d else None]
            row += [d.mean - half, d.mean + half] if d and half is not None else [None, None]
            row.append(d.verdict if d else "")
        writer.writerow("" if x is None else x for x in row)
    return text.getvalue()


def _cell(group: Group, m: Measure) -> str:
    values = list(group.of_seed(m.name).values())
    if not values:
        return "-"
    deviation = spread(values) if m.spread else None
    return format(mean(values), m.form) + (f" ± {deviation:{m.form}}" if deviation is not None else "")


def _words(d: Difference | None, *, measured: bool) -> list[str]:
    if d is None:
        return ["-", "-", "no seed in common" if measured else "not measured"]
    interval = "-" if d.half is None else f"{d.mean - d.half:+.4f} to {d.mean + d.half:+.4f}"
    return [f"{d.mean:+.4f}", interval, d.verdict]


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
