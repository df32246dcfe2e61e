"""Every YAML composes, round-trips and stands alone; presets have their published sizes."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
import yaml

from moetrain import config as configs
from moetrain.cli.compose import PACKAGES, compose, folder
from moetrain.cli.main import main
from moetrain.config import OPTIONS, UserError
from moetrain.job import Config
from moetrain.model.flops import size
from moetrain.model.transformer import Transformer
from moetrain.moe.routers.topk import Score

YAMLS = sorted(
    p.relative_to(folder()).with_suffix("")
    for p in folder().glob("*/*.yaml")
    if p.parent.name not in ("sweep", "cluster")
)
NEEDS = {"data/folder": ["data.corpora.text.path=/x"]}


def words(group: str, option: str) -> str:
    return f"{group}=[{option}]" if group == "balance" else f"{group}={option}"


@pytest.mark.parametrize("path", YAMLS, ids=str)
def test_every_yaml_composes_and_round_trips(path: Path, tmp_path) -> None:
    cfg = compose([words(path.parent.as_posix(), path.name), *NEEDS.get(path.as_posix(), [])])
    configs.write(cfg, tmp_path / "config.yaml")
    again = compose(["--config", str(tmp_path / "config.yaml")])
    assert configs.dump(again) == configs.dump(cfg)
    assert configs.load(yaml.safe_load((tmp_path / "config.yaml").read_text()), Config) == cfg


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in OPTIONS for o in OPTIONS[g]])
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    cfg = compose([words(group, option)])
    node = cfg.model.moe
    found = node.balance[option] if group == "balance" else getattr(node, group)
    assert type(found) is OPTIONS[group][option]
    assert group in PACKAGES


PUBLISHED = {  # billions of parameters: total, active
    "olmoe_1b_7b": (6.92, 1.28),
    "mixtral_8x7b": (46.70, 12.88),
    "mixtral_8x22b": (140.62, 39.15),
    "qwen2_57b_a14b": (57.41, 14.25),
    "qwen3_30b_a3b": (30.53, 3.35),
    "deepseek_moe_16b": (16.38, 2.83),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_their_published_sizes(preset: str) -> None:
    cfg = compose([f"model={preset}"])
    total, active = PUBLISHED[preset]
    assert size(cfg.model).total / 1e9 == pytest.approx(total, rel=0.002)
    assert size(cfg.model).active / 1e9 == pytest.approx(active, rel=0.01)
    with torch.device("meta"):
        model = Transformer(cfg.model)
    padding = (cfg.model.padded_vocab() - cfg.model.vocab_size) * cfg.model.dim * 2
    assert sum(p.numel() for p in model.parameters()) - padding == size(cfg.model).total


def test_cfg_job_prints_the_tree_and_the_sizes(capsys) -> None:
    assert main(["train", "--cfg", "job", "model=olmoe_1b_7b", "layout.ep=8", "optim.lr=3e-4"]) == 0
    out = capsys.readouterr().out
    assert "6.92B total, 1.28B active" in out
    node = yaml.safe_load(out)
    assert node["layout"]["ep"] == 8
    assert node["model"]["moe"]["router"]["top_k"] == 8


def test_experiment_with_and_without_plus() -> None:
    assert compose(["experiment=quickstart"]) == compose(["+experiment=quickstart"])
    assert compose(["experiment=quickstart", "train.steps=7", "optim.warmup=1"]).train.steps == 7
    sigmoid = compose(["router=topk_sigmoid", "balance=[expert_bias,sequence]"]).model.moe
    assert sigmoid.router.score is Score.sigmoid  # pyright: ignore[reportAttributeAccessIssue]
    assert list(sigmoid.balance) == ["expert_bias", "sequence"]
    assert compose(["balance=[]"]).model.moe.balance == {}


def test_nodes_are_sealed_and_wrong_types_are_named() -> None:
    cfg = compose([])
    with pytest.raises(FrozenInstanceError):
        cfg.train.steps = 3
    tree = configs.dump(cfg)
    for damage, says in (
        (lambda t: t["train"].update(steps="many"), "train.steps='many' is not a int"),
        (lambda t: t["train"].update(stepz=1), "unknown key 'train.stepz'; did you mean 'steps'?"),
        (lambda t: t["model"]["moe"]["router"].update(kind="topq"), "did you mean 'topk'?"),
        (lambda t: t.update(train=3), "train=3 is not a mapping"),
        (lambda t: t["optim"].update(schedule="cosin"), "is not one of constant, cosine, wsd"),
    ):
        broken = yaml.safe_load(yaml.safe_dump(tree))
        damage(broken)
        with pytest.raises(UserError) as caught:
            configs.load(broken, Config)
        assert says in str(caught.value)
