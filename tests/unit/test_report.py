"""``moetrain report``: one page that loads nothing, its pictures, and one line for what cannot be read."""

import base64
import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moetrain import config as configs
from moetrain.cli.main import main
from moetrain.job import Config
from moetrain.report.plots import smoothed
from moetrain.report.read import LAST, history
from moetrain.telemetry.alerts import METRICS

PNG = b"\x89PNG\r\n\x1a\n"


def record(step: int, *, layers: int, experts: int, health: bool, dropped: int = 0) -> dict:
    draw = random.Random(step)
    found = {"step": step, "tokens": 100, "loss": 5.0 - step / 100, "grad_norm": 1.0, "dropped": dropped}
    if health:
        series: dict = {name: [draw.random() for _ in range(layers)] for name in METRICS}
        series["load"] = [[2 * draw.random() for _ in range(experts)] for _ in range(layers)]
        series["top_pair_experts"] = [[0, 1]] * layers
        found |= {"health": series, "tokens_per_second": 1000.0}
    return found


def run(folder: Path, *, steps: int, layers: int = 2, experts: int = 4, every: int = 2, dropped: int = 0) -> Path:
    folder.mkdir(parents=True)
    records = [
        record(step, layers=layers, experts=experts, health=every > 0 and step % every == 0, dropped=dropped)
        for step in range(1, steps + 1)
    ]
    records.insert(steps // 2, {"step": steps // 2, "validation": "text", "nats_per_token": 4.5, "bits_per_byte": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


class Links(HTMLParser):
    """Everything that a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


CASES = {
    "a run": {"steps": 30},
    "drops": {"steps": 30, "dropped": 7},
    "one step": {"steps": 1, "every": 1},
    "many experts and layers": {"steps": 4, "layers": 40, "experts": 100},
    "no health, drops": {"steps": 30, "every": 0, "dropped": 7},
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_stands_alone_and_holds_its_pictures(case, tmp_path, capsys) -> None:
    folder = run(tmp_path / "<run> & co", **CASES[case])
    assert main(["report", str(folder)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert all(path.is_file() for path in printed)
    names = [path.name for path in printed]
    health = CASES[case].get("every") != 0
    assert names == ["index.html", "loss.png", *(["balance.png", "load.png"] if health else []), "drops.png"]
    text = printed[0].read_text()
    links = Links()
    links.feed(text)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert "&lt;run&gt; &amp; co" in text
    assert "<run>" not in text
    assert len(links.sources) == len(printed) - 1
    for source, path in zip(links.sources, printed[1:], strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == path.read_bytes()
        assert path.read_bytes().startswith(PNG)
    assert not re.search(r"url\(|@import", text)
    assert ("<table>" in text) == health
    assert main(["report", str(folder)]) == 0, "again, over what it left"


def test_the_heat_map_is_of_the_last_logging_steps_and_their_layers(tmp_path) -> None:
    folder = run(tmp_path / "run", steps=40)
    found = history(folder, [1, 3])
    assert found.layers == [1, 3]
    assert found.loads_of == LAST
    recent = [record(step, layers=2, experts=4, health=True)["health"]["load"] for step in range(22, 41, 2)]
    assert found.load_LE[1][2] == pytest.approx(sum(load[1][2] for load in recent) / LAST)
    assert found.held_out == {"text": [(20, 4.5)]}
    assert found.logged == list(range(2, 41, 2))
    assert history(folder, [0]).layers == [0, 1], "a config of another model does not count"


def test_a_run_that_goes_on_may_have_half_a_line(tmp_path) -> None:
    folder = run(tmp_path / "run", steps=6)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "lo')
    assert history(folder, None).steps == [1, 2, 3, 4, 5, 6]


def refused(capsys, argv: list[str], says: str) -> None:
    assert main(["report", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert says in lines[0]


def test_what_cannot_be_read_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    refused(capsys, [], "takes one folder, not 0")
    refused(capsys, ["a", "b"], "takes one folder, not 2")
    refused(capsys, ["--open", "a"], "unknown option --open")
    refused(capsys, [str(tmp_path / "none")], "is not a folder: name that of a run or a sweep")
    (tmp_path / "empty").mkdir()
    refused(capsys, [str(tmp_path / "empty")], "is neither a run (no metrics.jsonl) nor a sweep")
    (tmp_path / "empty/metrics.jsonl").write_text("")
    refused(capsys, [str(tmp_path / "empty")], "has no step yet")
    (tmp_path / "empty/metrics.jsonl").write_text("nonsense\n{}\n")
    refused(capsys, [str(tmp_path / "empty")], "metrics.jsonl:1 is not JSON")
    (tmp_path / "empty/metrics.jsonl").write_text("[1]\n{}\n")
    refused(capsys, [str(tmp_path / "empty")], "metrics.jsonl:1 is not a record of a step")
    folder = run(tmp_path / "run", steps=3)
    (folder / "report").write_text("in the way")
    refused(capsys, [str(folder)], "report cannot be written (File exists)")
    (folder / "report").unlink()
    (folder / "config.yaml").write_text("model: 3\n")
    refused(capsys, [str(folder)], "model=3 is not a mapping")
    configs.write(Config(), folder / "config.yaml")
    assert main(["report", str(folder)]) == 0
    monkeypatch.delitem(sys.modules, "moetrain.report.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(capsys, [str(folder)], "a report needs matplotlib: pip install 'moetrain[report]'")


def test_smoothing_is_a_mean_of_neighbours() -> None:
    assert smoothed([1.0, 2.0, 6.0, 3.0], over=1) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
