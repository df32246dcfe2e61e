"""What a verification says: the table of one layout, and the page of many, which is read back as it was written."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from moetrain.config import UserError
from moetrain.layouts import AXES, Layout
from moetrain.verify.compare import Report, kind
from moetrain.verify.session import Verdict

Entry = tuple[str, str, str]
"""(case, layout, verdict) of a page."""


def words(layout: Layout) -> str:
    """A solved layout in words that ``parse_layout`` reads: the degrees above 1."""
    degrees = {axis: getattr(layout, axis) for axis in (*AXES, "replicate")}
    return " ".join(f"{axis}={n}" for axis, n in degrees.items() if n > 1) or "one rank"


def parse_layout(text: str) -> Layout:
    """``"dp=4 ep=2"`` -> Layout; axes that are not named are 1, so the number of ranks is in the words."""
    degrees: dict[str, int] = {"dp": 1}
    for word in text.split() if text != "one rank" else ():
        axis, _, size = word.partition("=")
        if axis not in (*AXES, "replicate") or not size.isdigit():
            raise UserError(f"{word!r} in layout {text!r} is not axis=degree: write for example 'dp=4 ep=2'")
        degrees[axis] = int(size)
    layout = Layout(**degrees)
    return layout.solve(layout.world)


def table(report: Report) -> list[str]:
    """Lines: each quantity, how many were compared, the worst error and where, the verdict."""
    head = ("quantity", "compared", "worst", "verdict", "where")
    body = [
        (row.quantity, f"{row.compared:,}", f"{row.worst:.1e}" if row.worst else "0",
         "same" if row.same else "DIFFERENT", row.where)
        for row in report.rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(4)]
    return [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:<{widths[3]}}  {e}".rstrip()
        for a, b, c, d, e in (head, *body)
    ]


def groups(report: Report) -> list[str]:
    """Lines: over whom gradients are summed, and whose."""
    found: dict[str, list[str]] = {}
    for name, over in report.summed_over.items():
        kinds = found.setdefault(over, [])
        if kind(name) not in kinds:
            kinds.append(kind(name))
    lines = ["gradients are summed over"]
    for over, kinds in found.items():
        indented = textwrap.wrap(", ".join(kinds), 110, initial_indent="    ", subsequent_indent="    ")
        lines += [f"  {over}", *indented]
    return lines


def conclusion(verdict: Verdict) -> str:
    """One line: the same run, or the first thing that is not, and over whom its gradient is declared to be summed."""
    if verdict.kind == "same":
        return "the same run"
    if verdict.report is None:
        return f"{'FAILED' if verdict.kind == 'failed' else 'refused'}: {verdict.error}"
    return f"DIFFERENT: {cause(verdict.report)}"


def cause(report: Report) -> str:
    """The first difference: of the choices, else of a gradient, else of a number."""
    if report.choices.wrong is not None:
        return f"choices of expert, first {report.choices.wrong}, at a gap of {report.choices.gap:.1e}"
    if report.differences:
        first, last = report.differences[0], report.differences[-1]
        others = len(report.differences) - 1
        text = f"first {first.name}{first.part and f' ({first.part})'}, error {first.error:.1e}"
        text += f", its gradient is summed over {first.summed_over}"
        if others:
            text += f"; {others} more, the last {last.name}, summed over {last.summed_over}"
        return text
    row = next(row for row in report.rows if not row.same)
    return f"{row.quantity}, error {row.worst:.1e}{row.where and f' ({row.where})'}; every gradient is the same"


@dataclass(frozen=True)
class Case:
    """A variant of the config: on which layouts, in words, in which dtype, with which overrides ("" = as it is)."""

    where: str
    dtype: str
    overrides: str


@dataclass(frozen=True)
class Page:
    """All of a sweep. ``verdicts``: case -> what each layout gave; ``model`` is a line of the header."""

    command: str
    model: str
    cases: dict[str, Case]
    verdicts: dict[str, list[Verdict]]

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {"same": 0, "different": 0, "failed": 0, "gap": 0}
        for verdict in self.all():
            found[verdict.kind] += 1
        return found

    def worst(self) -> str:
        """The worst gradient error of each dtype, in words."""
        found: dict[str, float] = {}
        for name, case in self.cases.items():
            errors = [v.report.worst for v in self.verdicts[name] if v.report]
            found[case.dtype] = max([found.get(case.dtype, 0.0), *errors])
        words = [f"{x:.1e} in {dtype}" for dtype, x in found.items() if dtype != "bfloat16"]
        words += [f"{x:.2f} times one rank's in bfloat16" for dtype, x in found.items() if dtype == "bfloat16"]
        return ", ".join(words)

    def all(self) -> list[Verdict]:
        return [verdict for verdicts in self.verdicts.values() for verdict in verdicts]


def summary(page: Page) -> str:
    """One line of counts and the worst errors."""
    counts = ", ".join(f"{n} {kind}" for kind, n in page.counts().items() if n or kind == "same")
    ties = sum(v.report.choices.near_ties for v in page.all() if v.report)
    return f"{len(page.all())} comparisons: {counts}; worst gradient error {page.worst()}; {ties} near-ties replayed"


def line(verdict: Verdict) -> str:
    """A layout of a sweep, in one line."""
    if verdict.report is None:
        return f"{words(verdict.layout):<32} {conclusion(verdict)}"
    ties = f", {n} near-ties replayed" if (n := verdict.report.choices.near_ties) else ""
    return f"{words(verdict.layout):<32} {verdict.report.worst:.1e}{ties}  {conclusion(verdict)}"


def write(page: Page, path: Path, *, append: bool = False) -> None:
    """Markdown in a fixed order, without a date or a duration: the same run writes the same page but for rounding."""
    worlds = sorted({v.layout.world for v in page.all()})
    lines = [
        "# Layouts that were verified", "",
        "One training step of each layout beside one rank: choices of expert, loss, gradient norm, load, every",
        "parameter's gradient, the next weights, the expert bias (docs/verify.md). Written by", "",
        "```bash", page.command, "```", "",
        f"- model: {page.model}", f"- {summary(page)}", "",
        "| case | layouts | dtype | overrides |", "|---|---|---|---|",
        *(
            f"| {name} | {case.where} | {case.dtype} | {f'`{case.overrides}`' if case.overrides else 'as it is'} |"
            for name, case in page.cases.items()
        ),
        "", "| ranks | layouts | same | different | failed | refused |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for world in worlds:
        here = [v for v in page.all() if v.layout.world == world]
        kinds = [sum(v.kind == kind for v in here) for kind in ("same", "different", "failed", "gap")]
        layouts = len({words(v.layout) for v in here})
        lines.append(f"| {world} | {layouts} | {' | '.join(map(str, kinds))} |")
    lines += [
        "",
        "## Layouts",
        "",
        "| case | layout | worst gradient error | near-ties | verdict |",
        "|---|---|---|---|---|",
    ]
    for case, verdicts in page.verdicts.items():
        for v in verdicts:
            error, ties = (f"{v.report.worst:.1e}", v.report.choices.near_ties) if v.report else ("", "")
            what = v.kind if v.kind == "same" else f"{v.kind}: {_cell(cause(v.report) if v.report else v.error)}"
            lines.append(f"| {case} | {words(v.layout)} | {error} | {ties} | {what} |")
    lines += ["", "## Gaps", ""]
    gaps = [(case, v) for case, verdicts in page.verdicts.items() for v in verdicts if v.kind == "gap"]
    if gaps:
        lines += ["| feature | dimension | cause |", "|---|---|---|"]
        lines += [f"| {case} | {words(v.layout)} | {_cell(v.error)} |" for case, v in gaps]
    else:
        lines.append("none")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() + "\n" if append else ""
    path.write_text(before + "\n".join(lines) + "\n")


def parse(path: Path) -> list[Entry]:
    """(case, layout, verdict) of every line of the table that ``write`` made; raises ``UserError`` if it has none."""
    found: list[Entry] = []
    for body in path.read_text().split("\n## Layouts\n")[1:]:
        for text in body.partition("\n## Gaps\n")[0].splitlines()[3:]:
            cells = re.split(r"(?<!\\)\|", text)
            if len(cells) == 7:
                found.append((cells[1].strip(), cells[2].strip(), cells[5].strip().partition(":")[0]))
    if not found:
        raise UserError(f"{path} has no table of layouts: moetrain verify --all-layouts N --write {path} makes one")
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
