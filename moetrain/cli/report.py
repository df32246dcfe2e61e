"""``moetrain report RUN``: a run's loss, balance, loads and drops as one HTML page and its pictures."""

from pathlib import Path

from moetrain import config as configs
from moetrain.config import UserError
from moetrain.job import Config
from moetrain.report.page import page
from moetrain.report.read import history

_USAGE = """\
usage: moetrain report RUN

Reads RUN/metrics.jsonl, of a finished run or of one that goes on, and writes RUN/report/: index.html, which holds
everything and loads nothing, and its pictures as PNG: loss, balance, load, drops. Needs matplotlib (the extra report).
"""


def main(argv: list[str]) -> int:
    """Runs ``moetrain report ARGV``; raises ``UserError`` for the caller to print."""
    if any(word in ("-h", "--help") for word in argv):
        print(_USAGE, end="")
        return 0
    for word in argv:
        if word.startswith("-"):
            raise UserError(f"unknown option {word}: moetrain report takes one run folder and no option")
    if len(argv) != 1:
        raise UserError(f"moetrain report takes one run folder, not {len(argv)}: for example runs/quickstart")
    run = Path(argv[0]).expanduser()
    found = history(run, _layers(run))
    from moetrain.report.plots import draw  # matplotlib: a second to import, and not always there

    folder = run / "report"
    try:
        folder.mkdir(exist_ok=True)
        pictures = draw(found, folder)
        (folder / "index.html").write_text(page(found, pictures))
    except OSError as e:
        raise UserError(f"{folder} cannot be written ({e.strerror}): copy the run to where you can write") from e
    for path in (folder / "index.html", *pictures.values()):
        print(path)
    return 0


def _layers(run: Path) -> list[int] | None:
    """The numbers of the run's MoE layers, where its config is there to say."""
    path = run / "config.yaml"
    return configs.read(path, Config).model.moe_layers if path.exists() else None
