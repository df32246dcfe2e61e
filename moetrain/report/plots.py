"""A run's pictures, and how any are made; the one file that needs matplotlib."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moetrain.config import UserError
from moetrain.report.read import History
from moetrain.report.stats import mean

try:  # a plain ImportError would not say how to get it
    import matplotlib
    from matplotlib import colormaps as colormaps
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError as e:
    raise UserError("a report needs matplotlib: pip install 'moetrain[report]'") from e

F = TypeVar("F")
Picture = Callable[[Figure], None]
MAIN, WORST, OTHER, FAINT = "#1f6feb", "#d1495b", "#2a9d8f", "#9fb4cc"
SIZE = (8.0, 3.6)
DPI = 120
HOT = 4.0
"""Load / even share from which on a heat map's colour stays the same."""

_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "lines.linewidth": 1.6,
}  # fmt: skip


def draw(found: History, folder: Path) -> dict[str, Path]:
    """Write the pictures to ``folder``, as PNG; returns name -> file. Those of health only where it was recorded."""
    pictures: dict[str, tuple[Picture, tuple[float, float]]] = {"loss": (one(_loss, found), SIZE)}
    if found.logged:
        rows = len(found.load_LE)
        pictures["balance"] = (one(_balance, found), SIZE)
        pictures["load"] = (one(_load, found), (SIZE[0], min(9.0, max(2.4, 1.5 + 0.28 * rows))))
    pictures["drops"] = (one(_drops, found), (SIZE[0], 2.8 if any(found.dropped) else 0.8))
    return render(pictures, folder)


def one(picture: Callable[[F, Axes], None], found: F) -> Picture:
    """A picture of a single pair of axes."""
    return lambda figure: picture(found, figure.add_subplot())


def render(pictures: dict[str, tuple[Picture, tuple[float, float]]], folder: Path) -> dict[str, Path]:
    """Name -> (what draws it, its size in inches), written as PNG; returns name -> file."""
    made = {}
    with matplotlib.rc_context(_STYLE):  # pyright: ignore[reportArgumentType] (its keys are a Literal)
        for name, (picture, size) in pictures.items():
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            picture(figure)
            made[name] = folder / f"{name}.png"
            figure.savefig(made[name], dpi=DPI)
    return made


def _loss(found: History, axes: Axes) -> None:
    smooth = smoothed(found.loss, over=max(1, len(found.loss) // 50))
    several = len(found.loss) >= 20
    if several:
        axes.plot(found.steps, found.loss, color=FAINT, linewidth=0.9, label="each step")
    axes.plot(
        found.steps, smooth if several else found.loss, color=MAIN, marker=_dot(found.steps),
        label="smoothed" if several else "training",
    )  # fmt: skip
    for i, (name, points) in enumerate(found.held_out.items()):
        axes.plot(*zip(*points, strict=True), color=(WORST, OTHER)[i % 2], marker="o", label=f"held out {name}")
    axes.set(title="Loss", ylabel="nats per token")
    _finish(axes)


def _balance(found: History, axes: Axes) -> None:
    axes.plot(
        found.logged, [max(x) for x in found.health["max_violation"]], color=WORST, marker=_dot(found.logged),
        label="worst layer",
    )  # fmt: skip
    axes.plot(
        found.logged, [mean(x) for x in found.health["max_violation"]], color=MAIN, marker=_dot(found.logged),
        label="mean over layers",
    )  # fmt: skip
    smooth = [max(x) for x in found.health["smooth_max_violation"]]
    axes.plot(found.logged, smooth, color=WORST, linestyle=":", label="worst layer, smoothed load")
    axes.set(title="Balance", ylabel="max violation\n(max load / mean load - 1)")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _load(found: History, axes: Axes) -> None:
    rows, columns = len(found.load_LE), max(map(len, found.load_LE))
    hottest = max(max(row) for row in found.load_LE)
    most = min(HOT, max(2.0, hottest))  # one very hot expert would leave the others without colours
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=most)
    cells = [row + [math.nan] * (columns - len(row)) for row in found.load_LE]  # a layer may have fewer experts
    image = axes.imshow(cells, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    axes.grid(False)
    every = -(-rows // 24)
    axes.set_yticks(range(0, rows, every), [str(layer) for layer in found.layers[::every]])
    run, apart = found.neighbours, next(n for i in range(20) for n in (2**i,) if columns <= 16 * n)
    axes.set_xticks(range(0, columns, apart), [str(e * run) for e in range(0, columns, apart)])
    if columns <= 16 and rows <= 16:
        for i, row in enumerate(found.load_LE):
            for e, x in enumerate(row):
                dark = norm(x) < 0.15 or norm(x) > 0.85
                axes.text(e, i, f"{x:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    steps = f"last {found.loads_of} logging steps" if found.loads_of > 1 else "last logging step"
    axes.set(
        title=f"Load of every expert, mean of the {steps}",
        xlabel="expert" if run == 1 else f"first of {run} experts",
        ylabel="layer",
    )
    bar = axes.figure.colorbar(
        image, ax=axes, pad=0.015, aspect=10 if rows < 8 else 25, extend="max" if hottest > most else "neither"
    )
    bar.set_label("load / even share")
    bar.set_ticks([x for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0) if x <= most])


def _drops(found: History, axes: Axes) -> None:
    axes.set(title="Drops", ylabel="dropped assignments")
    if not any(found.dropped):
        axes.text(0.0, 0.5, "No assignment was dropped in any step.", va="center", transform=axes.transAxes)
        axes.set_axis_off()
    elif "drop_rate" in found.health:
        percent = [[100 * x for x in layers] for layers in found.health["drop_rate"]]
        axes.plot(found.logged, [max(x) for x in percent], color=WORST, marker=_dot(found.logged), label="worst layer")
        axes.plot(
            found.logged, [mean(x) for x in percent], color=MAIN, marker=_dot(found.logged), label="mean over layers"
        )
        axes.set_ylabel("dropped assignments, %")
        axes.set_ylim(bottom=0)
    else:
        axes.plot(found.steps, found.dropped, color=MAIN, marker=_dot(found.steps), label="all layers")
        axes.set_ylim(bottom=0)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _dot(steps: list[int]) -> str:
    """A mark where a line has so few points that it hides them."""
    return "o" if len(steps) < 4 else ""


def smoothed(values: list[float], *, over: int) -> list[float]:
    """Mean of a window of 2 * ``over`` + 1 around each, shorter at the ends."""
    sums = [0.0]
    for x in values:
        sums.append(sums[-1] + x)
    ends = [(max(0, i - over), min(len(values), i + over + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]
