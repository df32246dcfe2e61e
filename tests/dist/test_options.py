"""Every option of the MoE layer under four layouts is the run of one rank, in float64: a new file is one more case.

What depends on the layout by its own word is refused instead.
"""

import copy
import typing
from collections.abc import Callable
from enum import Enum
from functools import cache
from pathlib import Path

import pytest
from drawn import drawn
from test_same_run import check
from test_verify import Pool

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.cli.compose import compose
from moetrain.config import OPTIONS, UserError, dump, load, replace
from moetrain.job import Config
from moetrain.layouts import Layout
from moetrain.moe.zero_computation import KINDS
from moetrain.verify.session import ALONE, Reference, check_comparable, make_reference, verify

NEEDS = {  # what an option does not work without, or would show little without
    "expert_choice": {"non_causal": True},
    "group_limited": {"num_groups": 4, "max_groups": 2},
    "top_p": {"p": 0.2},
    "expert_bias": {"rate": 0.01},
    "hierarchical": {"ranks_per_node": 2},
    "capacity": {"factor": 1.0},
}
PLAIN = {"renormalize": False}
ONE = {"top_k": 1} | PLAIN
LAYOUTS = {
    "ep8": Layout(dp=8, ep=8),
    "dp2 tp2 cp2 with ep4 etp2": Layout(dp=2, tp=2, cp=2, ep=4, etp=2),
    "pp2 interleaved with ep4": Layout(pp=2, dp=4, ep=4),
    "capacity, accumulation 2": Layout(dp=4, ep=2),  # which drops, unless the case is a dispatcher
}
DEPEND = ("scope=local", "scope=global_buffered", "wire=bfloat16")  # on the layout, by their own word


def options() -> dict[str, dict]:
    """Case -> what it sets: every option of every group, every word that one of its keys may be, and the rest."""
    found = {}
    for group in ("router", "gate", "balance", "dispatcher", "placement"):
        for name, cls in OPTIONS[group].items():
            hints, first = typing.get_type_hints(cls), {"kind": name} | NEEDS.get(name, {})
            words = [(k, e.value) for k, x in hints.items() if isinstance(x, type) and issubclass(x, Enum) for e in x]
            nodes = {"": first} | {f" {k}={value}": first | {k: value} for k, value in words if group != "gate"}
            default = {f" {k}={dump(load(first, cls))[k]}" for k, _ in words}
            for more, node in nodes.items():
                if more not in default:
                    found[f"{group}={name}{more}"] = {group: {name: node} if group == "balance" else node}
    found["router=topk top_k=1"] = {"router": {"kind": "topk"} | ONE}
    found["router=random balanced"] = {"router": {"kind": "random", "balanced": True}}
    for rounding in ("nearest", "up", "down"):
        for scope in ("sequence", "micro_batch"):
            node = {"multiple": 4, "rounding": rounding, "scope": scope}
            found[f"rounding={rounding} {scope}"] = {"rounding": node}
    for router in ("top_p", "sinkhorn", "noisy_topk", "group_limited", "random"):
        node = {"kind": router} | NEEDS.get(router, {})
        found[f"rounding of {router}"] = {"router": node, "rounding": {"multiple": 3}}
    found |= {f"zero computation: {kind}": {"zero_computation": {kind: 2}} for kind in KINDS}
    found["experts that travel, calibrated"] = {"placement": {"kind": "fssdp", "calibrate": True}}
    found["experts that travel, little room"] = {"placement": {"kind": "fssdp", "memory": 3e-5}}
    found["placement=fssdp wire=bfloat16"] = {"placement": {"kind": "fssdp", "wire": "bfloat16"}}
    found["residual MoE"] = {"residual": True, "shared_gate": False, "router": {"kind": "topk"} | ONE}
    found["pyramid"] = {"per_layer": {"experts": [8, 8, 16], "top_k": [1, 2, 2]}, "router": {"kind": "topk"} | PLAIN}
    found["early top-k"] = {"per_layer": {"early_top_k": [4, 3], "early_steps": 2}}
    found["float8 experts"] = {"fp8_tile": 8, "hidden": 32}
    found["float8 experts that travel"] = {"fp8_tile": 8, "hidden": 32, "placement": {"kind": "fssdp"}}
    found["windows"] = {"model": {"windows": [5, 0, 9]}}
    found["frozen router"] = {"optim": {"freeze": ["*.moe.gate.*"]}}
    found["frozen router, muon"] = {"optim": {"freeze": ["*.moe.gate.*"], "kind": "muon"}}
    found["frozen all"] = {"optim": {"freeze": ["*"]}}
    return found


@cache
def small() -> dict:
    return dump(compose(["experiment=verified"]))


def config(case: str, *, capacity: bool, choices: Path | None = None) -> Config:
    """A small model with that option, and micro-batches of two samples for every layout above."""
    tree = copy.deepcopy(small())
    sets = dict(options()[case])
    tree["optim"] |= sets.pop("optim", {})
    windows = sets.pop("model", {})
    tree["train"] |= {"dtype": "float64", "seq_len": 27, "micro_batch": 2, "batch": 16}
    tree["pipeline"] |= {"schedule": "interleaved", "chunks": 2}
    tree["model"] |= {"num_layers": 4, "dim": 16, "num_heads": 4} | windows
    moe = tree["model"]["moe"]
    moe |= {"num_experts": 8} | ({"dispatcher": {"kind": "capacity", "factor": 1.0}} if capacity else {}) | sets
    if choices is not None:
        moe["router"] |= {"path": str(choices)}
    return load(tree, Config)


def words(case: str) -> str:
    """What a layout is told that cannot be the same run, or nothing."""
    try:
        cfg = config(case, capacity=False)
        for layout in LAYOUTS.values():
            check_comparable(replace(cfg, layout=layout), against=ALONE)
    except UserError as e:
        return str(e)
    return ""


CASES = list(options())
TRIALS = [(case, layout) for case in CASES if not case.endswith(DEPEND) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Callable[..., Reference]:
    """One rank's run of a case, with and without capacity dispatch; a case that names a dispatcher keeps it."""
    made: dict[tuple[str, bool], Reference] = {}

    def reference(case: str, pool: Pool, *, capacity: bool) -> Reference:
        capacity = capacity and "dispatcher" not in options()[case]
        if (case, capacity) not in made:
            recorded = None
            if case == "router=replay" or case.startswith("router=replay "):
                recorded = reference("router=topk", pool, capacity=False).choices
            cfg = config(case, capacity=capacity, choices=recorded)
            made[case, capacity] = make_reference(cfg, pool, tmp_path_factory.mktemp("reference"))
        return made[case, capacity]

    return reference


DRAWN = sorted(drawn(TRIALS, 6, of="options"), key=lambda trial: LAYOUTS[trial[1]].world)


@pytest.mark.parametrize(("case", "layout"), DRAWN, ids=str)
def test_every_option_is_the_same_run_under_every_layout(ranks, references, tmp_path, case, layout) -> None:
    pool = Pool(ranks(LAYOUTS[layout].world))
    reference = references(case, pool, capacity=layout.startswith("capacity"))
    verdict = verify(LAYOUTS[layout], reference, pool, tmp_path)
    if verdict.report is not None:
        print(f"{case} | {layout} | {verdict.kind} | {verdict.report.worst:.1e}")
    check(verdict)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(DEPEND)])
def test_what_depends_on_the_layout_is_refused_with_its_line(ranks, references, tmp_path, case) -> None:
    pool = Pool(ranks(8))
    reference = references(case, pool, capacity=False)
    verdict = verify(LAYOUTS["dp2 tp2 cp2 with ep4 etp2"], reference, pool, tmp_path)
    assert verdict.kind == "gap"
    assert case.rpartition(" ")[2] in verdict.error
    assert "\n" not in verdict.error


def test_nothing_else_is_refused() -> None:
    assert [case for case in CASES if words(case)] == [case for case in CASES if case.endswith(DEPEND)]
    kinds = {kind for group in ("router", "gate", "balance", "dispatcher") for kind in OPTIONS[group]}
    assert NEEDS.keys() <= kinds
