"""``moetrain fssdp-sim``: the load trace of a real run and what is made of it; words that are wrong are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.cli.fssdp_sim import _USAGE
from moetrain.cli.main import main
from moetrain.config import OPTIONS
from moetrain.telemetry.load_trace import read

TINY = [
    "model.vocab_size=512", "model.dim=32", "model.num_layers=3", "model.first_dense=1", "model.num_heads=4",
    "model.num_kv_heads=2", "model.moe.num_experts=4", "model.moe.hidden=32", "train.micro_batch=2", "train.seq_len=32",
]  # fmt: skip
STEPS, TOKENS, TOP_K = 6, 8 * 32, 2


@pytest.fixture(scope="module")
def traced(small_corpus, tmp_path_factory) -> Path:
    """A run, left after 4 of its 6 steps and continued; looked at every 4, which is not when it saves."""
    folder = tmp_path_factory.mktemp("traced") / "run"
    words = [
        *TINY, "layout.dp=1", "logging.load_trace=true", "logging.every=4", f"train.steps={STEPS}", "train.batch=8",
        "train.threads=1", "train.device=cpu", "train.validate_samples=2", "optim.warmup=1", "checkpoint.every=3",
        "data=folder", f"data.corpora.text.path={small_corpus}", f"run.dir={folder.parent}", f"run.name={folder.name}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "moetrain", "train", *words]
    for more in ("train.exit_after=4", "train.steps=6"):
        done = subprocess.run([*command, more], capture_output=True, text=True, timeout=120, env={**os.environ})
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_run_leaves_the_load_of_every_step(traced) -> None:
    found = read(traced)
    assert (found.layers, found.top_k, found.tokens) == ([1, 2], [TOP_K] * 2, TOKENS)
    assert found.steps == list(range(1, STEPS + 1))
    for load in found.loads:
        assert load.sum(1).tolist() == [TOKENS * TOP_K] * STEPS
    last = next(r for r in reversed(steps(traced)) if r.get("health"))
    told = [[x * TOKENS * TOP_K / 4 for x in layer] for layer in last["health"]["load"]]
    assert last["step"] == STEPS
    assert [x[-1].tolist() for x in found.loads] == [pytest.approx(x, abs=0.7) for x in told]  # to 0.01 of the mean


def steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert main(["fssdp-sim", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_recorded_trace_is_priced(traced, capsys) -> None:
    words = [f"trace={traced}", "--config", str(traced / "config.yaml"), "ranks=[2,4]", "cluster.ranks_per_node=4"]
    found = run(capsys, *words)
    assert found["steps"] == [1, 2, 3, 4, 5]  # from 0: all that a plan may know a load of
    assert [(x["ranks"], x["ep"], x["edp"]) for x in found["ranks"]] == [(2, 2, 1), (4, 4, 1)]
    for each in found["ranks"]:
        policies = each["policies"]
        assert policies.keys() == {*OPTIONS["placement"]}
        assert policies["static"]["speedup_layer"] == 1
        assert policies["replicate_all"]["token_bytes"] == 0
        for p in policies.values():
            assert p["moe"] == pytest.approx(p["compute"] + p["tokens"] + p["experts"] + p["reshard"])
            assert p["speedup_layer"] == pytest.approx(policies["static"]["layer"] / p["layer"])
    load = read(traced).loads[0][found["steps"][0]]
    assert found["ranks"][1]["policies"]["static"]["worst_overload"] >= float(load.max() / load.mean()) - 1e-9


def test_1024_ranks(capsys) -> None:
    """Experts are copied to 16 rows of static's ranks; a load twice as skewed is slower."""
    skews = (("0.5", "[fssdp]"), ("1.0", "[static]"))
    words = [
        "model=olmoe_1b_7b", "cluster=h100", "ranks=1024", "sim.steps=1", "sim.layers=1",
        "train.seq_len=4096", "train.micro_batch=1",
    ]  # fmt: skip
    found = [run(capsys, *words, f"trace.exponent={x}", f"policies={which}")["ranks"][0] for x, which in skews]
    assert (found[0]["ep"], found[0]["edp"]) == (64, 16)
    static = [x["policies"]["static"] for x in found]
    assert static[0]["replicas"] == pytest.approx(15 / 16)
    assert static[0]["layer"] < static[1]["layer"]
    assert found[0]["policies"]["fssdp"]["owned_gib"] == pytest.approx(static[0]["owned_gib"])


def test_the_table(capsys) -> None:
    words = ["model.moe.num_experts=6", "ranks=[4,8]", "cluster=h100", "trace=drift", "policies=shadow", "seed=3"]
    assert main(["fssdp-sim", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "trace drift, exponent 1.0, steps 200, every 20, share 0.25, seed 3; 8 steps of 4 layers priced" in lines
    headers = [line.split() for line in lines if line.startswith("policy")]
    rows = [line.split() for line in lines if line.startswith(("static ", "shadow "))]
    assert [row[0] for row in rows] == ["static", "shadow"] * 2
    assert all("layer ms" in " ".join(h) for h in headers)
    assert any(line.startswith("4 ranks: ep 2, edp 2;") for line in lines)  # 4 does not divide 6 experts, 2 does


def test_more_ranks_than_experts_is_said_under_the_table(capsys) -> None:
    words = ["model.moe.num_experts=4", "model.num_layers=2", "ranks=16", "sim.steps=1", "sim.layers=1"]
    assert main(["fssdp-sim", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    refused = [line for line in lines if line.startswith("fssdp: ")]
    assert len(refused) == 1
    assert "8 experts" in refused[0]


def test_help_names_every_key(capsys) -> None:
    assert main(["fssdp-sim", "--help"]) == 0
    assert capsys.readouterr().out == _USAGE
    for name in (*OPTIONS["placement"], "p3dn", "p4d", "h100", "sim.travel", "cluster.nodes", "trace.exponent"):
        assert name in _USAGE


CASES = {
    "an unknown cluster": ("cluster=p4", "cluster=p4: no such cluster; did you mean 'p4d'? (there are: h100, p3dn,"),
    "a cluster file that is not there": ("cluster=/nowhere.yaml", "cluster=/nowhere.yaml cannot be read"),
    "an unknown key of the cluster": ("cluster.node=4", "unknown key 'cluster.node'; did you mean 'nodes'?"),
    "a cluster without links": ("cluster.inter=0", "cluster.inter=0.0: has to be above 0"),
    "a share above one": ("cluster.gemm=1.5", "cluster.gemm=1.5: a share of cluster.peak"),
    "cards that nodes do not fill": ("cluster.ranks_per_nic=3", "use one of [1, 2, 4, 8]"),
    "a word for a number": ("cluster.nodes=two", "cluster.nodes='two' is not a int"),
    "a trace that is not there": ("trace=/nowhere.jsonl", "trace=/nowhere.jsonl: no such file"),
    "a trace that is misspelt": ("trace=zipff", "did you mean 'zipf'?"),
    "an unknown key of the trace": ("trace.every=5", "unknown key 'trace.every'"),
    "a skew below none": ("trace.exponent=-1", "trace.exponent=-1.0: has to be 0 (even) or more"),
    "a share of experts above one": ("trace=drift trace.share=2", "trace.share=2.0"),
    "ranks that fill no node": ("ranks=[8,12]", "ranks=12 does not fill nodes of cluster.ranks_per_node=8: use 8 or"),
    "ranks that divide no node": ("ranks=3", "ranks=3 does not divide cluster.ranks_per_node=8: use one of"),
    "more ranks than there are": ("ranks=64", "4 x 8 = 32; use 32 or fewer, or set cluster.nodes=8"),
    "ranks below one": ("ranks=0", "ranks=0: has to be at least 1"),
    "no ranks": ("ranks=[]", "ranks=[]: give how many ranks"),
    "ranks that are words": ("ranks=[a]", "ranks[0]='a' is not a int"),
    "ranks that cannot be parsed": ("ranks=[8", "'ranks=[8' cannot be parsed"),
    "an unknown policy": ("policies=[fsdp]", "policies=fsdp: no such policy; did you mean 'fssdp'?"),
    "an unknown assumption": ("sim.step=1", "unknown key 'sim.step'; did you mean 'steps'?"),
    "an assumption without a name": ("sim=1", "unknown key 'sim'"),
    "an unknown way to travel": ("sim.travel=ring", "sim.travel='ring' is not one of direct, relay"),
    "no step": ("sim.steps=0", "sim.steps=0: has to be at least 1"),
    "a key without a value": ("ranks", "'ranks' is not key=value"),
    "an unknown flag": ("--jsn", "unknown option --jsn; did you mean '--json'?"),
    "an unknown model": ("model=olmo", "did you mean 'olmoe_1b_7b'?"),
    "a model without experts": ("model.first_dense=99", "the model has no MoE layer"),
    "plans in the step": (
        "placement=fssdp model.moe.placement.calibrate=true", "model.moe.placement.calibrate=true is not simulated",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "says"), CASES.values(), ids=CASES)
def test_wrong_words_are_one_line(words: str, says: str, capsys) -> None:
    refused(capsys, words.split(), says=says)


def test_a_trace_of_another_model_is_one_line(traced, capsys) -> None:
    refused(capsys, [f"trace={traced}", *TINY, "model.moe.num_experts=8"], says="2 MoE layers of 4 experts, the model")
    refused(capsys, [f"trace={traced}", *TINY, "model.moe.router.top_k=3"], says="2 MoE layers of 2 experts a token")
    refused(capsys, [f"trace={traced}", *TINY, "trace.exponent=1"], says="trace.exponent is of trace=zipf")


def test_a_damaged_trace_is_one_line(traced, tmp_path, capsys) -> None:
    path = tmp_path / "loads.jsonl"
    path.write_text((traced / "loads.jsonl").read_text().replace('"step": 3', '"step": 2'))
    refused(capsys, [f"trace={path}", *TINY], says="line 4: step 2 after step 2")


def refused(capsys: pytest.CaptureFixture, words: list[str], *, says: str) -> None:
    """Exit code 2 and exactly one line that says it."""
    assert main(["fssdp-sim", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert says in err
