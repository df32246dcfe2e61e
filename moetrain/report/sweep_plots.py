"""A sweep's pictures: loss against balance, and both over the steps, a colour a group."""

from pathlib import Path

from moetrain.report.plots import Axes, Figure, Line2D, MaxNLocator, Picture, colormaps, one, render, smoothed
from moetrain.report.stats import mean
from moetrain.report.trials import MOST, Group, Sweep

Colour = tuple[float, float, float, float]
WIDE = 9.0
_MARKS = "osD^vP*X<>"


def draw(found: Sweep, baseline: Group, folder: Path) -> dict[str, Path]:
    """Write the pictures to ``folder``, as PNG; returns name -> file. Those of health only where it was recorded."""
    groups = sorted(found.groups, key=lambda g: mean([t.loss for t in g.trials]))[:MOST]
    shown = [g for g in found.groups if g in groups]
    tall = max(0.0, 0.2 * len(shown) - 2.6)  # a legend beside the axes
    pictures: dict[str, tuple[Picture, tuple[float, float]]] = {}
    healthy = [g for g in shown if any(t.per_step_L for t in g.trials)]
    if healthy:
        pictures["tradeoff"] = (one(_tradeoff, healthy), (WIDE, 4.2 + tall))
    pictures["loss"] = (lambda figure: _loss(shown, baseline, figure), (WIDE, 4.0 + tall))
    if healthy:
        pictures["balance"] = (one(_balance, healthy), (WIDE, 3.8 + tall))
    return render(pictures, folder)


def _tradeoff(groups: list[Group], axes: Axes) -> None:
    held_out = all(t.held_out is not None for g in groups for t in g.trials)
    violations = []
    for i, group in enumerate(groups):
        dots = [(t.violation, t.held_out if held_out else t.loss) for t in group.trials if t.violation is not None]
        violations += [x for x, _ in dots]
        axes.scatter(
            *zip(*dots, strict=True), s=46, color=_colour(i, groups), marker=_MARKS[i % len(_MARKS)], alpha=0.85,
            edgecolor="white", linewidth=0.6, zorder=3,
        )  # fmt: skip
    _violations(axes, "x", violations)
    axes.set(
        title="Loss against balance, a dot a seed", xlabel="max violation (mean over layers, of the last steps)",
        ylabel=f"{'held-out' if held_out else 'training'} loss, nats per token",
    )  # fmt: skip
    _legend(groups, axes, marks=True)


def _loss(groups: list[Group], baseline: Group, figure: Figure) -> None:
    """Curves of the whole run, and what they differ by, which the curves hide."""
    whole, right = figure.subplots(1, 2, width_ratios=(2, 3))
    apart: list[float] = []
    steps = max(t.history.steps[-1] for g in groups for t in g.trials)
    for i, group in enumerate(groups):
        _band(whole, *_curves([(t.history.steps, t.history.loss) for t in group.trials]), _colour(i, groups))
        at, curves = _curves(_apart(group, baseline))
        if group is baseline:
            right.axhline(0.0, color=_colour(i, groups), linewidth=1.4)
        elif curves:
            _band(right, at, curves, _colour(i, groups))
            apart += [x for curve in curves for step, x in zip(at, curve, strict=True) if step > steps / 4]
    if apart:  # the first steps, where all fall fast, may differ by more than all the rest
        margin = 0.08 * (max(*apart, 0.0) - min(*apart, 0.0)) or 0.01
        right.set_ylim(min(*apart, 0.0) - margin, max(*apart, 0.0) + margin)
    whole.set(title="Training loss, smoothed", ylabel="nats per token", xlabel="step")
    right.set(
        title="and its difference", ylabel=f"minus that of the same seed of\n{_cut(baseline.label)}", xlabel="step"
    )
    for axes in (whole, right):
        _steps(axes)
    _legend(groups, right)


def _apart(group: Group, baseline: Group) -> list[tuple[list[int], list[float]]]:
    """(steps, loss minus the baseline's) of every seed that both have."""
    base = {t.seed: dict(zip(t.history.steps, t.history.loss, strict=True)) for t in baseline.trials}
    found = []
    for t in group.trials:
        pairs = zip(t.history.steps, t.history.loss, strict=True)
        both = [(step, loss - base[t.seed][step]) for step, loss in pairs if step in base.get(t.seed, {})]
        if both:
            found.append(([step for step, _ in both], [x for _, x in both]))
    return found


def _balance(groups: list[Group], axes: Axes) -> None:
    seen = []
    for i, group in enumerate(groups):
        health = [(t.history.logged, t.history.health.get("max_violation", [])) for t in group.trials]
        at, curves = _curves([(logged, [mean(x) for x in layers]) for logged, layers in health])
        seen += [x for curve in curves for x in curve]
        _band(axes, at, curves, _colour(i, groups))
    _violations(axes, "y", seen)
    axes.set(title="Balance, smoothed", ylabel="max violation, mean over layers", xlabel="step")
    _steps(axes)
    _legend(groups, axes)


def _curves(series: list[tuple[list[int], list[float]]]) -> tuple[list[int], list[list[float]]]:
    """(steps, values) of each seed -> the steps as far as all go, a smoothed curve each."""
    series = [(at, values) for at, values in series if at and len(at) == len(values)]
    at = min((at for at, _ in series), key=len, default=[])
    return at, [smoothed(values, over=max(1, len(values) // 30))[: len(at)] for _, values in series]


def _band(axes: Axes, at: list[int], curves: list[list[float]], colour: Colour) -> None:
    """The mean of the curves, and from their lowest to their highest."""
    if not at or not curves:
        return
    columns = list(zip(*curves, strict=True))
    axes.plot(at, [mean(list(x)) for x in columns], color=colour, marker="o" if len(at) < 4 else "", linewidth=1.4)
    if len(curves) > 1:
        low, high = [min(x) for x in columns], [max(x) for x in columns]
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _legend(groups: list[Group], axes: Axes, *, marks: bool = False) -> None:
    """Beside the axes, where it covers nothing."""
    handles = [
        Line2D([], [], color=_colour(i, groups), marker=_MARKS[i % len(_MARKS)] if marks else "", label=_cut(g.label),
               linestyle="" if marks else "-")
        for i, g in enumerate(groups)
    ]  # fmt: skip
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, fontsize=9)


def _colour(i: int, groups: list[Group]) -> Colour:
    """Ten that are told apart at a glance; of more, a scale in the order of the groups."""
    return colormaps["tab10"](i) if len(groups) <= 10 else colormaps["turbo"](0.04 + 0.92 * i / (len(groups) - 1))


def _violations(axes: Axes, name: str, values: list[float]) -> None:
    """The ``name`` ("x" or "y") axis of max violations: from 0; a log scale where they differ by a factor of 20, linear
    below the least where a group is exactly even."""
    axis, limits = (axes.xaxis, axes.set_xlim) if name == "x" else (axes.yaxis, axes.set_ylim)
    scale = axes.set_xscale if name == "x" else axes.set_yscale
    above = [x for x in values if x > 1e-3]
    if not above or max(above) <= 20 * min(above):
        limits(-0.02 * max(values) if name == "x" else 0.0)
        return
    least, most = min(above), max(above)
    even = len(above) < len(values)
    if even:
        scale("symlog", linthresh=least, linscale=0.6)
        limits(-0.15 * least if name == "x" else 0.0, 1.3 * most)
    else:
        scale("log")
    few = most > 1000 * least
    marks = [m * 10.0**n for n in range(-3, 4) for m in ((1,) if few else (1, 2, 5))]
    marks = [x for x in marks if least <= x <= 1.3 * most]
    axis.set_ticks([0.0] * even + marks, [f"{x:g}" for x in [0.0] * even + marks])
    axis.set_ticks([], minor=True)


def _steps(axes: Axes) -> None:
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))


def _cut(label: str) -> str:
    return label if len(label) <= 40 else label[:39] + "…"
