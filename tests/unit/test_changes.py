"""What may change in a config when a run goes on: every field is tagged, every change is named."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from moetrain import config as configs
from moetrain.changes import _TAGS, Tag, changes, check, tags_of
from moetrain.cli.compose import compose
from moetrain.config import OPTIONS, UserError
from moetrain.job import Config
from moetrain.telemetry.alerts import AlertConfig


def nodes(cls: type = Config, found: set[type] | None = None) -> set[type]:
    """Every class of a config that a user can write."""
    found = set() if found is None else found
    if cls in found:
        return found
    found.add(cls)
    options = [option for group in OPTIONS.values() for option in group.values()]
    for hint in get_type_hints(cls).values():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type):
                for node in (part, *(option for option in options if issubclass(option, part))):
                    if is_dataclass(node):
                        nodes(node, found)
    return found


NODES = sorted(nodes() | {option for group in OPTIONS.values() for option in group.values()}, key=lambda c: c.__name__)
"""Those of other test modules are not in it: they are not imported by ``moetrain``."""


@pytest.mark.parametrize("cls", [c for c in NODES if c.__module__.startswith("moetrain.")], ids=lambda c: c.__name__)
def test_every_field_has_one_tag(cls: type) -> None:
    for f in fields(cls):
        assert len(tags_of(cls, f.name)) == 1, f"{cls.__name__}.{f.name}: give it a tag in moetrain/changes.py"


def test_the_tables_name_what_there_is() -> None:
    there = {base.__name__: {f.name for f in fields(base)} for c in NODES for base in c.__mro__ if is_dataclass(base)}
    for table in _TAGS.values():
        for cls, names in table.items():
            assert set(names.split()) <= there.get(cls, set()), cls


def changed(*overrides: str, before: tuple[str, ...] = ()) -> list[tuple[str, Any, Any, str]]:
    old, new = configs.dump(compose([*before])), compose([*before, *overrides])
    return [(c.key, c.old, c.new, c.tag.value) for c in changes(old, new)]


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([], []),
        (["optim.lr=0.5"], [("optim.lr", 1e-3, 0.5, "trajectory")]),
        (["layout.ep=2", "layout.dp=2"], [("layout.dp", -1, 2, "free"), ("layout.ep", 1, 2, "free")]),
        (["model.dim=64"], [("model.dim", 256, 64, "shape")]),
        (["placement=fssdp"], "model.moe.placement free"),
        (["dispatcher=capacity"], "model.moe.dispatcher trajectory"),
        (["optim.kind=muon"], [("optim.kind", "adamw", "muon", "shape")]),
        (["model.moe.router.scale=2.0"], [("model.moe.router.scale", 1.0, 2.0, "trajectory")]),
        (["balance=[z_loss]"], "model.moe.balance.switch trajectory"),
        (["model.moe.balance.switch.coef=0.5"], [("model.moe.balance.switch.coef", 0.01, 0.5, "trajectory")]),
        (["seed=3", "train.steps=7"], [("seed", 0, 3, "trajectory"), ("train.steps", 1000, 7, "trajectory")]),
    ],
)
def test_changes_are_named(overrides: list[str], found: Any) -> None:
    seen = changed(*overrides)
    assert found == seen if isinstance(found, list) else [found] == [f"{key} {tag}" for key, _, _, tag in seen]


def test_elements_of_a_list_of_nodes() -> None:
    def having(*above: float) -> Config:
        alerts = [AlertConfig(metric="entropy", above=x) for x in above]
        return configs.replace(cfg, health=configs.replace(cfg.health, alerts=alerts))

    cfg = compose([])
    seen = changes(configs.dump(having(1.0, 2.0)), having(1.0, 3.0))
    assert [(c.key, c.old, c.new, c.tag) for c in seen] == [("health.alerts[1].above", 2.0, 3.0, Tag.free)]
    seen = changes(configs.dump(having(1.0)), having(1.0, 3.0))
    assert [c.key for c in seen] == ["health.alerts"]


def test_a_key_of_a_newer_moetrain_had_its_default() -> None:
    old = configs.dump(compose([]))
    del old["train"]["threads"], old["health"]
    assert changes(old, compose([])) == []
    assert [c.key for c in changes(old, compose(["train.threads=3"]))] == ["train.threads"]


def test_what_is_not_allowed_is_refused_with_the_words_to_allow_it() -> None:
    found = changes(configs.dump(compose([])), compose(["optim.lr=0.5", "optim.warmup=7", "layout.ep=2"]))
    keys = r"\[optim.lr,optim.warmup\]"
    with pytest.raises(UserError, match=rf"optim.lr was 0.001, is 0.5; optim.warmup was .*'run.allow={keys}'"):
        check(found, allow=[], where="step-00000003")
    with pytest.raises(UserError, match=rf"otherwise: optim.warmup was .*'run.allow={keys}'"):
        check(found, allow=["optim.lr"], where="step-00000003")
    with pytest.raises(UserError, match="otherwise"):
        check(found, allow=["optim.l"], where="step-00000003")
    check(found, allow=["optim"], where="step-00000003")
    with pytest.raises(UserError, match=r"model.dim was 256 in step-3 and is 64 now.* another run.name"):
        check(changes(configs.dump(compose([])), compose(["model.dim=64"])), allow=["model"], where="step-3")
