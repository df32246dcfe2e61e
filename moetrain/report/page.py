"""One HTML file of a run, or of a sweep: pictures and tables, nothing loaded from anywhere."""

import base64
import html
from pathlib import Path

from moetrain.report.read import History
from moetrain.report.stats import median
from moetrain.report.tables import Table, against, comparison_note, facts, not_counted, notes, of_groups
from moetrain.report.trials import MOST, Group, Sweep
from moetrain.telemetry.alerts import METRICS

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b2733;
  background: #fff }
h1 { font-size: 1.4rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 } p.facts { color: #51606f; margin-top: 0 }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #dde4ea; white-space: nowrap }
th { font-weight: 600 } p.note { color: #51606f; font-size: .85rem; margin: .3rem 0 }
table.words td:first-child, table.words th:first-child { text-align: left }
table.lines td { text-align: left; white-space: normal } dt { font-weight: 600 } dd { margin: 0 0 .3rem 1.2rem }
"""
WORDS = {
    "loss": "Training loss, and held-out loss where it was measured.",
    "balance": "How far the fullest expert is above an even share: 0 is even, 1 is twice its share.",
    "load": "Load of every expert over its even share: 1 is even.",
    "drops": "Assignments that found no room under capacity dispatch.",
}
SWEEP_WORDS = {
    "tradeoff": "Loss against balance, a dot a run.",
    "loss": "Training loss of each group, mean over seeds, and its difference from the baseline's, seed by seed.",
    "balance": "Max violation of each group over the steps, mean over layers and seeds.",
}


def page(found: History, pictures: dict[str, Path]) -> str:
    """The whole file of a run."""
    return _document(found.name, _facts(found), [*_images(pictures, WORDS), _table(found)])


def sweep_page(found: Sweep, baseline: Group, pictures: dict[str, Path]) -> str:
    """The whole file of a sweep."""
    body = [
        "<h2>Groups</h2>",
        _html(of_groups(found)),
        *(f"<p class='note'>{html.escape(x)}.</p>" for x in notes(found)),
    ]
    if len(found.groups) > 1:
        body += [f"<h2>Against {html.escape(baseline.label)}</h2>", _html(against(found, baseline))]
        body += [f"<p class='note'>{html.escape(comparison_note(baseline))}</p>"]
    if len(found.groups) > MOST:
        body += [f"<p class='note'>The pictures show the {MOST} groups of the lowest training loss.</p>"]
    body += _images(pictures, SWEEP_WORDS)
    if found.left_out:
        body += ["<h2>Not counted</h2>", _html(not_counted(found))]
    return _document(str(found.folder), facts(found), body)


def _document(name: str, facts: list[str], body: list[str]) -> str:
    name, lines = html.escape(name), "\n".join(body)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{name}</h1>
<p class="facts">{html.escape("; ".join(facts))}</p>
{lines}
</body>
</html>
"""


def _images(pictures: dict[str, Path], words: dict[str, str]) -> list[str]:
    return [
        f'<img alt="{html.escape(words[name])}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for name, path in pictures.items()
    ]


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>\n" for row in table.rows)
    return (
        f"<div class='wide'><table class='{table.kind}'><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _facts(found: History) -> list[str]:
    rates = found.tokens_per_second
    facts = [
        f"{found.steps[-1]:,} steps, {sum(found.tokens):,} tokens",
        f"loss {found.loss[0]:.4f} at step {found.steps[0]}, {found.loss[-1]:.4f} at step {found.steps[-1]}",
    ]
    facts += [f"held out {name}: {points[-1][1]:.4f} nats a token" for name, points in found.held_out.items()]
    return facts + ([f"{median(rates):,.0f} tokens/s (median)"] if rates else [])


def _table(found: History) -> str:
    """Every metric of every layer at the last logging step."""
    if not found.logged:
        return "<p>No router health was recorded (health.enabled=false, or a model without MoE layers).</p>"
    names = list(found.health)
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ["layer", *names])
    rows = []
    for i, layer in enumerate(found.layers):
        cells = [str(layer), *(_cell(found, name, i) for name in names)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    meanings = "".join(f"<dt>{html.escape(n.replace('_', ' '))}</dt><dd>{html.escape(METRICS[n])}</dd>" for n in names)
    return (
        f"<h2>MoE layers at step {found.logged[-1]:,}</h2>\n<div class='wide'><table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{''.join(rows)}</tbody></table></div>\n<dl>{meanings}</dl>"
    )


def _cell(found: History, name: str, i: int) -> str:
    value = found.health[name][-1][i]
    pair = f" ({found.top_pair[i][0]}, {found.top_pair[i][1]})" if name == "top_pair" and value else ""
    return f"{value:.4g}{pair}"
