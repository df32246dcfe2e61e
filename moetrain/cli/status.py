"""``moetrain status [RUN...]``: how far runs are, in what state, what they took. Only reads their folders."""

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path

from moetrain.cluster import slurm
from moetrain.config import UserError
from moetrain.report.progress import Progress, State, is_run, look, runs_below

_COLUMNS = ("run", "state", "step", "loss", "tokens/s", "left", "saved", "hours", "energy")


def main(argv: list[str]) -> int:
    """Runs ``moetrain status ARGV``; raises ``UserError`` for the caller to print."""
    parser = argparse.ArgumentParser(
        prog="moetrain status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_HELP
    )
    parser.add_argument("run", nargs="*", type=Path, help="a run's folder, or one with runs below it [runs]")
    parser.add_argument("--json", action="store_true", help="a list of records, of everything that is known")
    args = parser.parse_args(argv)
    folders = []
    for place in [path.expanduser() for path in args.run] or [Path("runs")]:
        found = [place] if is_run(place) else list(runs_below(place))
        if not found:
            what = "no run lies below it" if place.is_dir() else "it is no folder"
            raise UserError(f"{place}: {what}; give the folder of a run, for example runs/quickstart")
        folders += found
    now = time.time()
    found = [look(folder, now=now) for folder in folders]
    for progress in found:
        _job(progress)
    if args.json:
        print(json.dumps([progress.record() for progress in found], indent=1))
    else:
        print("\n".join(table(found)))
    return 0


def _job(progress: Progress) -> None:
    """Of Slurm, what it says of a run's newest job, where it is here."""
    with suppress(UserError):
        if (number := slurm.last_job(progress.folder)) and progress.state is not State.complete:
            where = slurm.state(number) or f"over: see {progress.folder}/launch/slurm-{number}.out"
            progress.lines.append(f"job {number} is {where}")


_HELP = """\
state     waiting   there is a config, and no life yet
          starting  a life has begun, and no step of it is told yet
          training  something was written of late
          silent    nothing was, for longer than usual: killed, cut off, hung, or what it waits for is slow. Whether a
                    process lives on another machine cannot be seen from here
          hung      the watchdog has ended it; who was where stands below
          stopped   how it ended stands below; the same command continues
          complete  every step is done, and the summary is there
left      until the last step, by the speed of late; without saves and validations
saved     age of the newest committed checkpoint, and its step
hours     ranks x the time from a life's first word in its log to its last one, lost steps and saves included
energy    as far as the run has measured it
"""


def table(found: list[Progress]) -> list[str]:
    """A line a run, and below it what there is to say."""
    rows = [_COLUMNS, *(_row(progress) for progress in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    shown = [i for i in range(len(_COLUMNS)) if i < 3 or any(row[i] != "-" for row in rows[1:])]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in rows]
    for progress in reversed(found):
        at = 2 + found.index(progress)
        lines[at:at] = [f"    {line}" for line in progress.lines]
    return lines


def _row(progress: Progress) -> tuple[str, ...]:
    p = progress
    quiet = f" {span(p.age)}" if p.state is State.silent and p.age is not None else ""
    steps = "-" if p.step is None else f"{p.step}" + (f"/{p.steps}" if p.steps else "")
    hours = "-" if p.rank_hours is None else f"{p.rank_hours:.3g} {'GPU' if p.device == 'cuda' else 'CPU'}"
    return (
        str(p.folder), p.state.value + quiet, steps, _or(p.loss, ".4f"), _or(p.tokens_per_second, ",.0f"),
        "-" if p.left is None else span(p.left),
        "-" if p.saved_step is None else f"{span(p.saved_age or 0)} ago, {p.saved_step}",
        hours, "-" if p.energy is None else _energy(p.energy),
    )  # fmt: skip


def _or(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _energy(joules: float) -> str:
    return f"{joules / 3.6e6:.3g} kWh"


def span(seconds: float) -> str:
    """The two largest units of a time."""
    seconds = max(0, round(seconds))
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // small
            return f"{seconds // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"
