"""Router health by hand: every metric of a known load, alerts, the heat map, a run that an alert ends."""

import json
import math

import pytest
import torch
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.cli.compose import compose
from moetrain.cli.main import main
from moetrain.config import UserError, load
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Routing
from moetrain.moe.watch import Watch, pair_at
from moetrain.telemetry import health as health_file
from moetrain.telemetry.alerts import METRICS, Action, AlertConfig, Alerts
from moetrain.telemetry.health import Health, HealthConfig, Reading
from moetrain.telemetry.load_picture import heat_map

E, T = 4, 6


def routing(ids: list[list[int]], logits_TE: Tensor | None = None) -> Routing:
    ids_TK = torch.tensor(ids)
    logits_TE = torch.zeros(len(ids), E) if logits_TE is None else logits_TE
    ragged = bool((ids_TK < 0).any())
    return Routing(logits_TE, logits_TE, ids_TK, torch.ones(ids_TK.shape), ragged)


def noted(*micro_batches: Routing, dropped: list[int] | None = None, top_k: int = 2) -> MoE:
    """A layer that has seen these."""
    layer = MoE(MoEConfig(num_experts=E, hidden=4, router=TopK(top_k=top_k, renormalize=top_k > 1)), dim=4, layer=3)
    layer.begin_step(len(micro_batches), watch=True, pairs=True)
    assert layer.watch is not None
    for m, seen in enumerate(micro_batches):
        layer.load_ME[m] = seen.load_E
        layer.watch.note(m, seen, None, again=False)
    if dropped is not None:
        layer.dropped_ME[0] = torch.tensor(dropped)
    return layer


def reading(layer: MoE, cfg: HealthConfig | None = None) -> Reading:
    mesh = Mesh.build(Layout(dp=1), rank=0, world=1, device=torch.device("cpu"))
    health = Health(cfg or HealthConfig(), layers={3: layer.cfg}, mesh=mesh)
    load_LE = layer.load_ME.sum(0)[None]
    health.smooth(load_LE)
    return health.read(health.brief(health.part([layer]), load_LE).tolist(), tokens=T)


CHOICES = [[0, 1], [1, 0], [0, 2], [0, 1], [2, 0], [0, 2]]  # load 6, 3, 3, 0


def test_every_metric_of_a_known_load() -> None:
    logits_TE = torch.zeros(T, E)
    logits_TE[2, 3], logits_TE[4, 1] = 2.0, -5.5
    layer = noted(routing(CHOICES[:3]), routing(CHOICES[3:], logits_TE[3:]), dropped=[2, 0, 0, 0])
    layer.bias_E.copy_(torch.tensor([0.3, -0.4, 0.0, 0.0]))
    found = reading(layer)
    want = {
        "max_violation": 1.0, "smooth_max_violation": 1.0, "variation": math.sqrt(4.5) / 3,
        "entropy": 1.5 * math.log(2) / math.log(4), "dead": 1, "drop_rate": 2 / 12, "overload": 1.0, "bias_norm": 0.5,
        "largest_logit": 5.5, "top_pair": 0.5, "ffn_experts": 2.0, "home_overload": 1.0, "replicas": 0, "moved": 0.0,
    }  # fmt: skip
    assert found.layers[3] == pytest.approx(want)
    assert want.keys() == METRICS.keys()
    assert found.load == [[2.0, 1.0, 1.0, 0.0]]
    assert found.top_pair == [(0, 1)]
    assert found.not_finite is None
    record = json.loads(json.dumps(found.record()))
    assert record["dead"] == [1]
    assert record["top_pair_experts"] == [[0, 1]]
    assert record["load"] == [[2.0, 1.0, 1.0, 0.0]]


def test_a_step_without_tokens_and_one_choice_a_token() -> None:
    values = reading(noted(routing([[-1, -1]] * T))).layers[3]
    assert values["dead"] == E
    assert all(math.isfinite(x) for name, x in values.items() if name != "smooth_max_violation")
    alone = reading(noted(routing([[0]] * T), top_k=1))
    assert alone.layers[3]["top_pair"] == 0
    assert alone.layers[3]["entropy"] == 0


def test_pairs_are_counted_once_and_not_where_a_choice_is_missing() -> None:
    watch = Watch.empty(1, num_experts=E, pairs=True, like=torch.zeros(1))
    seen = routing([[3, 0, 1], [1, 3, -1], [2, 2, -1]][:2])
    watch.note(0, seen, None, again=False)
    watch.note(0, seen, None, again=True)
    counts = {pair_at(p): n for p, n in enumerate(watch.pairs_P.tolist()) if n}
    assert counts == {(0, 1): 1, (0, 3): 1, (1, 3): 2}
    assert [pair_at(p) for p in range(6)] == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


def test_padding_and_nan_logits() -> None:
    logits_TE = torch.zeros(T, E)
    logits_TE[0, 0], logits_TE[1, 1] = 2.0, math.nan
    watch = Watch.empty(2, num_experts=E, pairs=True, like=torch.zeros(1))
    real_T = torch.tensor([True, False, True, True, True, True])
    watch.note(0, routing(CHOICES, logits_TE), real_T, again=False)
    watch.note(1, routing(CHOICES, logits_TE), None, again=False)
    assert watch.logit_M[0] == 2.0
    assert watch.logit_M[1].isnan()
    assert reading(noted(routing(CHOICES, logits_TE))).not_finite == "largest router logit nan in layer 3 on rank 0"


def test_the_smoothed_load_forgets_noise_and_keeps_what_stays() -> None:
    mesh = Mesh.build(Layout(dp=1), rank=0, world=1, device=torch.device("cpu"))

    def smoothed(loads: list[list[int]]) -> float:
        moe = MoEConfig(num_experts=2, hidden=4)
        health = Health(HealthConfig(smoothing=0.9), layers={0: moe}, mesh=mesh)
        for load_E in loads:
            health.smooth(torch.tensor([load_E]))
        layer = MoE(moe, dim=4, layer=0)
        layer.begin_step(1, watch=True, pairs=True)
        brief = health.brief(health.part([layer]), torch.tensor([loads[-1]]))
        return health.read(brief.tolist(), tokens=4).layers[0]["smooth_max_violation"]

    assert smoothed([[4, 0], [0, 4]] * 50) < 0.06
    assert smoothed([[6, 2]] * 50) == pytest.approx(0.5)


def test_a_long_record_holds_means_of_neighbours(monkeypatch) -> None:
    monkeypatch.setattr(health_file, "MOST_LOADS", 2)
    record = reading(noted(routing(CHOICES))).record()
    assert record["load"] == [[1.5, 0.5]]
    assert record["neighbours"] == 2


def values(**known: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, 1.0) | known


def test_an_alert_fires_after_n_logging_steps_on_end_and_once() -> None:
    cfg = AlertConfig(metric="max_violation", above=2.0, action=Action.stop, after=3)
    alerts = Alerts([cfg, AlertConfig(metric="entropy", below=0.5)])
    high, low = {0: values(), 7: values(max_violation=4.25)}, {0: values(), 7: values()}
    for _ in range(2):
        assert alerts.look(high) == []
    assert alerts.look(low) == []
    fired = [alerts.look(high) for _ in range(4)]
    assert [len(f) for f in fired] == [0, 0, 1, 0]
    assert fired[2][0].action is Action.stop
    assert fired[2][0].line == "max_violation of layer 7 is 4.25, above 2 at 3 logging steps on end"
    both = alerts.look({0: values(entropy=0.4), 7: values(entropy=0.1)})
    assert [f.line for f in both] == ["entropy of layer 7 is 0.1, below 0.5 (1 more layer too)"]
    assert alerts.look({0: values(), 7: values(entropy=math.nan)}) == [], "said once while it lasts"


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"alerts": [{"metric": "max_violatio", "above": 1.0}]}, "did you mean 'max_violation'?"),
        ({"alerts": [{"metric": "entropy"}]}, "give above=X, below=X or both"),
        ({"alerts": [{"metric": "entropy", "below": 1.0, "after": 0}]}, "at least 1 logging step"),
        ({"alerts": [{"metric": "entropy", "below": 1.0, "action": "halt"}]}, "is not one of warn, stop"),
        ({"alerts": [{"metric": "entropy", "below": 1.0}], "enabled": False}, "health.enabled=true"),
        ({"smoothing": 1.0}, "health.smoothing=1.0: has to be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_one_line(node, says) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?").replace(".", r"\.")) as caught:
        load(node, HealthConfig, "health")
    assert "\n" not in str(caught.value)


def test_alerts_on_the_command_line() -> None:
    cfg = compose(["health.alerts=[{metric: dead, above: 2, action: stop, after: 5}, {metric: entropy, below: 0.5}]"])
    assert cfg.health.alerts == [
        AlertConfig(metric="dead", above=2.0, action=Action.stop, after=5),
        AlertConfig(metric="entropy", below=0.5),
    ]
    with pytest.raises(UserError, match="no such metric"):
        compose(["health.alerts=[{metric: deaf, above: 2}]"])


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (4, 8), (27, 64), (61, 256), (500, 3000)])
def test_the_heat_map_fits_and_shows_the_hottest(layers: int, experts: int) -> None:
    load_LE = torch.ones(layers, experts)
    load_LE[-1, -1], load_LE[0, 0] = 10.0 * experts, 0.0
    lines = heat_map(list(enumerate(load_LE.tolist())))
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 100
    assert "█" in lines[-2]
    assert len({len(line) for line in lines[1:-1]}) == 1, "cells stand under each other"
    assert ("most loaded of" in lines[0]) == (layers > 18 or experts > 88)
    assert heat_map([]) == []


def test_a_pyramid_of_layers_is_drawn_as_wide_as_each_is() -> None:
    lines = heat_map([(1, [1.0, 1.0]), (3, [0.0, 1.0, 1.0, 2.0])])
    assert [len(line.split(" ", 4)[4]) for line in lines[1:3]] == [6, 12]


def small(corpus, folder, *more: str) -> list[str]:
    return [
        "train", "model.vocab_size=512", "model.dim=16", "model.num_layers=2", "model.num_heads=2",
        "model.num_kv_heads=2", "model.moe.num_experts=4", "model.moe.hidden=16", "train.steps=9", "train.batch=4",
        "train.micro_batch=2", "train.seq_len=16", "train.device=cpu", "train.threads=1", "train.validate_samples=4",
        "optim.warmup=1", "checkpoint.every=0", "logging.every=2", "data=folder", f"data.corpora.text.path={corpus}",
        f"run.dir={folder}", "run.name=run", *more,
    ]  # fmt: skip


def test_a_run_that_an_alert_ends_has_saved_and_says_why(small_corpus, tmp_path, capsys) -> None:
    stop = "health.alerts=[{metric: max_violation, above: -0.5, action: stop, after: 2}]"
    assert main(small(small_corpus, tmp_path, stop)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("stopped and saved at step 2: max_violation of layer ")
    assert lines[0].endswith("above -0.5 at 2 logging steps on end (1 more layer too)")
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000002"]
    assert main(small(small_corpus, tmp_path)) == 0, "without the alert it continues"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 10))
    assert [r["step"] for r in records if "health" in r] == [1, 2, 4, 6, 8, 9]
    assert all(len(x) == 2 for r in records if "health" in r for x in r["health"].values())
    assert "resumed from" in capsys.readouterr().out


def test_a_warning_is_a_line_and_the_run_goes_on(small_corpus, tmp_path, capsys) -> None:
    assert main(small(small_corpus, tmp_path, "health.alerts=[{metric: entropy, above: 0.1}]", "train.steps=3")) == 0
    assert capsys.readouterr().out.count("warning: entropy of layer") == 1


def test_switched_off_it_leaves_no_trace(small_corpus, tmp_path) -> None:
    assert main(small(small_corpus, tmp_path, "health.enabled=false", "train.steps=3")) == 0
    assert "health" not in (tmp_path / "run/metrics.jsonl").read_text()
