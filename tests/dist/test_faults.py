"""Every planted bug is caught, in a config that was shrunk from hundreds of ranks; without it, the run is the same."""

import random
from functools import cache

import pytest
from drawn import ALL, commit, drawn
from test_verify import Pool

from moetrain.cli.compose import compose
from moetrain.config import UserError
from moetrain.layouts import Layout
from moetrain.verify import faults
from moetrain.verify.session import make_reference, verify
from moetrain.verify.shrink import shrink

COMMON = [
    "model=qwen3_30b_a3b", "balance=[switch,sequence,expert_bias]", "dispatcher=capacity", "data.ignore_tokens=[3]",
    "train.batch=512", "train.micro_batch=1", "train.seq_len=4095",
]  # fmt: skip
ORIGINALS = {
    "tp and dp": [*COMMON, "layout.dp=64", "layout.tp=8", "layout.ep=64"],
    "tp, norms over all heads": [*COMMON, "layout.dp=1", "layout.tp=8", "layout.ep=8", "model.qk_norm=full"],
    "cp and dp, expert TP": [*COMMON, "layout.dp=16", "layout.cp=8", "layout.ep=8", "layout.etp=16"],
    "dp": [*COMMON, "layout.dp=64"],
    "tp and Muon": [*COMMON, "layout.dp=1", "layout.tp=8", "optim=muon"],
    "experts travel": [*COMMON, "layout.dp=32", "layout.ep=8", "placement=fssdp"],
}
PIPELINES = {
    "tp and dp": ["layout.pp=4", "pipeline.schedule=zbv"],
    "tp, norms over all heads": ["layout.pp=8", "pipeline.schedule=dualpipev"],
    "cp and dp, expert TP": ["layout.pp=4", "pipeline.schedule=interleaved"],
    "dp": ["layout.pp=2", "model.tie_embeddings=true"],
    "tp and Muon": ["layout.pp=2"],
    "experts travel": ["layout.pp=2", "pipeline.schedule=interleaved"],
}
for _name, _words in PIPELINES.items():
    ORIGINALS[f"{_name}, pp"] = [*ORIGINALS[_name], *_words]


@pytest.fixture(scope="module")
def shrunk():
    @cache
    def small(name: str):
        cfg = compose(ORIGINALS[name])
        return shrink(cfg, world=cfg.layout.world, ranks=8).cfg

    return small


@pytest.fixture(scope="module")
def references(shrunk, ranks, tmp_path_factory):
    @cache
    def made(name: str):
        pool = Pool(ranks(shrunk(name).layout.world))
        return make_reference(shrunk(name), pool, tmp_path_factory.mktemp("reference"))

    return made


OF_TRAVEL = {"replicas_not_summed", "replicas_out_of_order"}
OF_PIPELINES = {"norm_of_a_stage", "balance_in_both_backwards", "tied_ends_not_summed"}


def placed(one: str) -> list[bool]:
    """Whether to run in a pipeline, in one stage, or both: the commit says so."""
    return [True, False] if ALL else [random.Random(f"{commit()} {one}").random() < 0.5]


@pytest.mark.parametrize("name", [n + ", pp" * pipeline for n in PIPELINES for pipeline in placed(n)])
def test_without_a_fault_the_originals_are_the_same_run(ranks, tmp_path, shrunk, references, name) -> None:
    layout = shrunk(name).layout
    assert (layout.pp > 1) == name.endswith("pp")
    assert verify(layout, references(name), Pool(ranks(layout.world)), tmp_path / "layout").kind == "same"


SOME = drawn(sorted(faults.FAULTS.keys() - OF_PIPELINES - OF_TRAVEL), 9, of="faults") + sorted(OF_TRAVEL)
CAUGHT = [(f, pipeline) for f in SOME for pipeline in placed(f)] + [(f, True) for f in sorted(OF_PIPELINES)]


@pytest.mark.parametrize(("fault", "pipeline"), CAUGHT)
def test_every_fault_is_caught(ranks, tmp_path, shrunk, references, fault, pipeline) -> None:
    names = [n for n in ORIGINALS if n.endswith("pp") == pipeline]
    shows = [n for n in names if faults.FAULTS[fault].needs(shrunk(n), shrunk(n).layout) is None]
    assert shows, "one of the originals can show it"
    name = min(shows, key=lambda n: shrunk(n).layout.world)
    layout = shrunk(name).layout
    verdict = verify(layout, references(name), Pool(ranks(layout.world)), tmp_path / "layout", fault=fault)
    assert verdict.kind == "different", verdict.error


def test_an_unknown_fault_and_one_that_cannot_show_are_refused() -> None:
    cfg = compose(["experiment=verified"])
    with pytest.raises(UserError, match=r"--inject nonsense: no such fault"):
        faults.require("nonsense", cfg, Layout(dp=2))
    with pytest.raises(UserError, match=r"--inject positions_restart needs cp > 1: layout .* cannot show it"):
        faults.require("positions_restart", cfg, Layout(dp=2))
