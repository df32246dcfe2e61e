"""``moetrain report`` of a sweep: the numbers of its groups are those of the runs' metrics, and a difference is only
called one where its interval says so."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import Links, record, refused, run

from moetrain import config as configs
from moetrain.cli.main import main
from moetrain.cli.sweep import run_point
from moetrain.config import UserError
from moetrain.job import Config, RunConfig
from moetrain.report.points import leaves, short
from moetrain.report.stats import Difference, paired, t_quantile
from moetrain.report.trials import _labels, sweep

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import balance_study

LAST, LAYERS = 3, 2
WORDS = [
    "model.vocab_size=512", "model.dim=32", f"model.num_layers={LAYERS}", "model.num_heads=4", "model.num_kv_heads=2",
    "model.moe.num_experts=4", "model.moe.hidden=32", "train.steps=6", "train.batch=4", "train.micro_batch=2",
    "train.seq_len=32", "train.threads=1", "train.device=cpu", "train.validate_samples=4", "optim.warmup=1",
    "checkpoint.every=0", "logging.every=1", "data=folder", "dispatcher=capacity",
]  # fmt: skip
FILES = ["index.html", "tradeoff.png", "loss.png", "balance.png", "table.md", "table.csv"]


@pytest.fixture(scope="module")
def swept(small_corpus, tmp_path_factory) -> Path:
    """Two groups of two seeds that drop much and little, and one that cannot be run."""
    folder = tmp_path_factory.mktemp("sweep")
    where = [f"data.corpora.text.path={small_corpus}", f"run.dir={folder}", "run.name=runs"]
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", "train", "-m", *WORDS, *where, "seed=1,2",
         "model.moe.dispatcher.factor=0.5,1.25,-1"],
        capture_output=True, text=True, timeout=120, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 points: 4 done, 2 skipped\n" in done.stdout
    assert f"compare them: moetrain report {folder / 'runs'}" in done.stdout
    return folder / "runs"


def report(folder: Path, *more: str) -> list[Path]:
    assert main(["report", str(folder), "--last", str(LAST), *more]) == 0
    return [folder / "report" / name for name in FILES]


def steps(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r][-LAST:]


def test_the_numbers_of_a_group_are_those_of_its_runs(swept, capsys) -> None:
    files = report(swept)
    assert [Path(line) for line in capsys.readouterr().out.splitlines()] == files
    rows = {row["group"]: row for row in csv.DictReader(files[-1].read_text().splitlines())}
    assert list(rows) == ["factor=0.5", "factor=1.25"]
    points = [json.loads(path.read_text()) for path in sorted((swept / "points").iterdir())]
    losses: dict[str, dict[int, float]] = {}
    for label, row in rows.items():
        mine = [p for p in points if f"model.moe.dispatcher.{label}" in p["overrides"]]
        runs = [steps(Path(p["folder"])) for p in mine]
        losses[label] = {seed: sum(r["loss"] for r in trial) / LAST for seed, trial in enumerate(runs, 1)}
        one, two = losses[label].values()
        assert row["seeds"] == "1 2"
        assert float(row["loss"]) == pytest.approx((one + two) / 2)
        assert float(row["loss_std"]) == pytest.approx(abs(one - two) / math.sqrt(2))
        assert float(row["held_out"]) == pytest.approx(sum(p["loss"] for p in mine) / 2)
        worst, summed, dropped = [], [], []
        for trial in runs:
            worst.append(max(sum(r["health"]["max_violation"][i] for r in trial) / LAST for i in range(LAYERS)))
            loads = [[sum(r["health"]["load"][i][e] for r in trial) / LAST for e in range(4)] for i in range(LAYERS)]
            summed.append(sum(max(load) - 1 for load in loads) / LAYERS)
            dropped.append(sum(x for r in trial for x in r["health"]["drop_rate"]) / LAST / LAYERS)
        assert float(row["violation_worst"]) == pytest.approx(sum(worst) / 2)
        assert float(row["summed"]) == pytest.approx(sum(summed) / 2)
        assert float(row["summed_worst"]) < float(row["violation_worst"])
        assert float(row["drop_rate"]) == pytest.approx(sum(dropped) / 2, abs=1e-4), "health's has four digits"
    assert float(rows["factor=0.5"]["drop_rate"]) > 0.49 > float(rows["factor=1.25"]["drop_rate"])
    apart = [losses["factor=1.25"][seed] - losses["factor=0.5"][seed] for seed in (1, 2)]
    half = 12.7062 * abs(apart[0] - apart[1]) / 2
    row = rows["factor=1.25"]
    assert float(row["loss_difference"]) == pytest.approx(sum(apart) / 2)
    assert float(row["loss_high"]) == pytest.approx(sum(apart) / 2 + half, rel=1e-4)
    assert rows["factor=0.5"]["loss_difference"] == ""


def test_the_page_stands_alone_and_names_what_is_not_counted(swept, tmp_path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(swept, moved)
    files = report(moved, "--against=factor=1.25")
    text = files[0].read_text()
    links = Links()
    links.feed(text)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert [s.partition(",")[0] for s in links.sources] == ["data:image/png;base64"] * 3
    assert not re.search(r"url\(|@import", text)
    table = files[-2].read_text()
    for words in (text, table):
        assert "Against factor=1.25" in words
        assert "6 points: 4 done, 2 skipped" in words
        assert "model.moe.dispatcher.factor=-1" in words
        assert "has to be above 0 and finite" in words
    assert "| factor=0.5 | 2 |" in table
    shutil.rmtree(moved / "000-seed=1,model.moe.dispatcher.factor=0.5")
    assert len(sweep(moved, last=LAST).trials) == 4, "it is still where it was run"


def test_what_cannot_be_compared_is_one_line(swept, tmp_path, capsys) -> None:
    refused(capsys, [str(swept), "--agianst", "x"], "unknown option --agianst; did you mean '--against'?")
    refused(capsys, [str(swept), "--against"], "--against needs a value")
    refused(capsys, [str(swept), "--against", "lr"], "'lr' is no group of")
    refused(capsys, [str(swept), "--against", "factor=3"], "use one of factor=0.5, factor=1.25")
    for n in ("0", "-1", "many"):
        refused(capsys, [str(swept), "--last", n], f"--last '{n}' is not a number of steps: use 1 or more")
    run = next(swept.glob("000-*"))
    refused(capsys, [str(run), "--last", "3"], "--last is for the folder of a sweep, and")
    refused(capsys, [str(tmp_path)], "is neither a run (no metrics.jsonl) nor a sweep (no points/000.json)")

    def illegal() -> Config:
        raise UserError("optim.lr=0: too low")

    run_point(illegal, lambda cfg: "", sweep=tmp_path / "bad", number=0, overrides=["optim.lr=0"])
    capsys.readouterr()
    refused(capsys, [str(tmp_path / "bad")], "without a finished point (1 skipped); the first: optim.lr=0: too low")
    (tmp_path / "bad/points/001.json").write_text("{}")
    refused(capsys, [str(tmp_path / "bad")], "001.json is not a point of a sweep")


def test_many_groups_of_one_seed(tmp_path) -> None:
    """More groups than colours; one of them recorded no health, one left no metrics, one was never finished."""
    for number in range(36):
        cfg = configs.replace(Config(), run=RunConfig(dir=str(tmp_path), name=f"runs/{number:03d}-n={number}"))

        def train(cfg: Config, number: int = number) -> str:
            cfg.run.folder.mkdir(parents=True)
            configs.write(cfg, cfg.run.folder / "config.yaml")
            records = [record(step, layers=4, experts=8, health=number != 7, dropped=3) for step in range(1, 9)]
            if number != 8:
                (cfg.run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            return "exit code 1" if number == 9 else ""

        run_point(lambda cfg=cfg: cfg, train, sweep=tmp_path / "runs", number=number, overrides=[f"optim.lr={number}"])
    files = report(tmp_path / "runs")
    assert "show the 30 groups of the lowest" in files[0].read_text()
    table = files[-2].read_text()
    assert table.count("| one seed: no interval |") == 33, "36, but for two that are not counted, and the baseline"
    assert table.count("| not measured |") == 33, "there is no held-out loss"
    assert "no seed in common" not in table
    assert "exit code 1" in table
    assert "is neither a run" in table


def test_student_s_t() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {n: round(t_quantile(n), 3) for n in table} == table
    assert round(t_quantile(2, level=0.99), 3) == 9.925
    a, b = {1: 3.0, 2: 3.2, 3: 3.1, 4: 9.0}, {1: 3.1, 2: 3.3, 3: 3.3, 5: 0.0}
    found = paired(a, b)
    assert found is not None
    assert found.seeds == 3
    assert found.mean == pytest.approx(-0.4 / 3)
    assert found.half == pytest.approx(4.30265 * math.sqrt(0.01 / 3) / math.sqrt(3), rel=1e-5)
    assert found.verdict == "not distinguishable"
    assert paired({1: 1.0}, {2: 1.0}) is None
    verdicts = {(-0.2, 0.1): "lower", (0.2, 0.1): "higher", (0.1, 0.1): "not distinguishable",
                (0.0, 0.0): "not distinguishable", (0.2, None): "one seed: no interval"}  # fmt: skip
    assert {(mean, half): Difference(3, mean, half).verdict for mean, half in verdicts} == verdicts


def test_labels_say_what_differs() -> None:
    def labels(*groups: str) -> list[str]:
        return list(_labels([tuple(group.split()) for group in groups]).values())

    assert labels("method=none a=1", "method=switch a=1") == ["none", "switch"]
    assert labels("balance=[] a=1", "balance=[switch] a=1") == ["balance=[]", "balance=[switch]"]
    assert labels("optim.lr=1 b=2", "optim.lr=2 b=3", "b=3") == ["lr=1 b=2", "lr=2 b=3", "b=3"]
    assert labels("x.top_k=1 y.top_k=2", "x.top_k=2 y.top_k=1") == ["x.top_k=1 y.top_k=2", "x.top_k=2 y.top_k=1"]
    assert labels("optim.lr=1", "+optim.lr=2") == ["lr=1", "lr=2"]
    assert labels("optim.lr=1") == ["optim.lr=1"]
    wide, narrow = "m={num_experts:8,hidden:4,router:{top_k:2}}", "m={num_experts:8,hidden:2,router:{top_k:4}}"
    assert labels(wide, narrow) == ["hidden=4 top_k=2", "hidden=2 top_k=4"]
    assert leaves([wide]) == {"m.num_experts": "8", "m.hidden": "4", "m.router.top_k": "2"}
    assert (short(wide), short("optim.lr=1")) == ("num_experts=8,hidden=4,top_k=2", "optim.lr=1")


def test_the_page_of_the_study_keeps_what_is_written_by_hand(swept, tmp_path, capsys) -> None:
    for number, method in enumerate(m for m in ("none", "switch", "expert_bias") for _ in range(2)):
        name = f"runs/{number:03d}-{method}"
        cfg = configs.replace(Config(), seed=number % 2, run=RunConfig(dir=str(tmp_path), name=name))

        def train(cfg: Config, number: int = number) -> str:
            run(cfg.run.folder, steps=8 + number // 2, every=1)
            configs.write(cfg, cfg.run.folder / "config.yaml")
            return ""

        words = [f"method={method}", f"seed={number % 2}"]
        run_point(lambda cfg=cfg: cfg, train, sweep=tmp_path / "runs", number=number, overrides=words)

    def write(folder: Path) -> str:
        """What is said of an error, or nothing."""
        code = balance_study.main([str(folder), "--write", str(tmp_path / "page.md"), "--last", "4"])
        said = capsys.readouterr().err
        assert code == (2 if said else 0)
        return said

    assert write(tmp_path / "runs") == ""
    page = (tmp_path / "page.md").read_text()
    assert "| `none` | No balancing at all. |" in page
    assert page.index("## Against none") < page.index("## Against switch")
    assert "`expert_bias`, load summed over 4 logged steps of the last 4" in page
    assert all((tmp_path / found).stat().st_size for found in re.findall(r"\((page/\w+\.png)\)", page))
    assert len(re.findall(r"\(page/\w+\.png\)", page)) == 3
    (tmp_path / "page.md").write_text(page.replace("by hand: begin -->", "by hand: begin -->\nSeen."))
    assert write(tmp_path / "runs") == ""
    assert (tmp_path / "page.md").read_text() == page.replace("by hand: begin -->", "by hand: begin -->\nSeen.")
    assert "has no finished run of none and switch" in write(swept)
    (tmp_path / "page.md").write_text("Mine.")
    assert "has not one <!-- by hand: begin -->" in write(tmp_path / "runs")
    assert (tmp_path / "page.md").read_text() == "Mine."
