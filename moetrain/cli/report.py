"""``moetrain report FOLDER``: a run's loss, balance, loads and drops, or how the runs of a sweep compare, as one HTML
page and its pictures."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from moetrain import caches
from moetrain import config as configs
from moetrain.config import UserError, nearest
from moetrain.job import Config
from moetrain.report.page import page, sweep_page
from moetrain.report.points import paths
from moetrain.report.read import history
from moetrain.report.tables import as_csv, markdown
from moetrain.report.trials import LAST, sweep

_USAGE = f"""\
usage: moetrain report RUN
       moetrain report SWEEP [--last N] [--against GROUP]

RUN: reads RUN/metrics.jsonl, of a finished run or of one that goes on, and writes RUN/report/: index.html, which holds
everything and loads nothing, and its pictures as PNG: loss, balance, load, drops.

SWEEP, the folder of `moetrain train -m`: compares its finished runs, those that differ by their seed alone as one
group, and writes SWEEP/report/: index.html, its pictures (tradeoff, loss, balance), table.md and table.csv.

  --last N         last steps that losses, balance and drops are of ({LAST})
  --against GROUP  the group that the others are compared with, seed by seed: its label, or its overrides (the first)

Needs matplotlib (the extra report).
"""
_OPTIONS = ("--last", "--against")


def main(argv: list[str]) -> int:
    """Runs ``moetrain report ARGV``; raises ``UserError`` for the caller to print."""
    if any(word in ("-h", "--help") for word in argv):
        print(_USAGE, end="")
        return 0
    folders, options = _parse(argv)
    if len(folders) != 1:
        raise UserError(f"moetrain report takes one folder, not {len(folders)}: for example runs/quickstart")
    folder = Path(folders[0]).expanduser()
    caches.keep_in(folder / "cache")
    if paths(folder):
        return _sweep(folder, options)
    found = history(folder, _layers(folder))
    if options:
        raise UserError(f"{next(iter(options))} is for the folder of a sweep, and {folder} is a run: leave it away")
    from moetrain.report.plots import draw  # matplotlib: a second to import, and not always there

    with _writing(folder) as out:
        pictures = draw(found, out)
        (out / "index.html").write_text(page(found, pictures))
    return _told([out / "index.html", *pictures.values()])


def _sweep(folder: Path, options: dict[str, str]) -> int:
    last = options.get("--last", str(LAST))
    if not last.isdecimal() or int(last) < 1:
        raise UserError(f"--last {last!r} is not a number of steps: use 1 or more (without it: {LAST})")
    found = sweep(folder, last=int(last))
    baseline = found.group(options["--against"]) if "--against" in options else found.groups[0]
    from moetrain.report.sweep_plots import draw

    with _writing(folder) as out:
        pictures = draw(found, baseline, out)
        (out / "index.html").write_text(sweep_page(found, baseline, pictures))
        (out / "table.md").write_text(markdown(found, baseline))
        (out / "table.csv").write_text(as_csv(found, baseline))
    return _told([out / "index.html", *pictures.values(), out / "table.md", out / "table.csv"])


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """The folder of the report, made; what cannot be written there is one line."""
    out = folder / "report"
    try:
        out.mkdir(exist_ok=True)
        yield out
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e.strerror}): copy {folder} to where you can write") from e


def _told(files: list[Path]) -> int:
    print("\n".join(map(str, files)))
    return 0


def _parse(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """(folders, option -> its value)."""
    folders, options, words = [], {}, iter(argv)
    for word in words:
        name, has_value, value = word.partition("=")
        if not word.startswith("-"):
            folders.append(word)
        elif name not in _OPTIONS:
            raise UserError(f"unknown option {name}{nearest(name, _OPTIONS)} (there are: {', '.join(_OPTIONS)})")
        else:
            value = value if has_value else next(words, "")
            if not value:
                raise UserError(f"{name} needs a value: moetrain report --help says which")
            options[name] = value
    return folders, options


def _layers(run: Path) -> list[int] | None:
    """The numbers of the run's MoE layers, where its config is there to say."""
    path = run / "config.yaml"
    return configs.read(path, Config).model.moe_layers if path.exists() else None
