"""Every sweep of configs/sweep: each of its points is a legal job, and what the file claims to keep is kept."""

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from moetrain.cli.compose import folder, register
from moetrain.cli.main import main
from moetrain.job import Config, check
from moetrain.model.flops import Size, size
from moetrain.world import wanted_ranks

SWEEPS = sorted(path.stem for path in (folder() / "sweep").glob("*.yaml"))
GROWING = {"sparsity": sorted, "sparsity_top_k": lambda sizes: sorted(sizes, reverse=True)}
"""Those whose total parameters change, and in which order; in all others they may not."""


@pytest.fixture
def started():
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder())):
        yield


def points(name: str) -> list[list[str]]:
    """The overrides of each point, as Hydra's own sweeper makes them of ``hydra.sweeper.params``; of the seeds one."""
    params = hydra.compose("train", overrides=[f"sweep={name}"], return_hydra_config=True).hydra.sweeper.params
    values = {key: str(value).split(",")[0] if key == "seed" else value for key, value in params.items()}
    words = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in values.items()])
    (batch,) = BasicSweeper.split_arguments(words, max_batch_size=None)
    return [list(point) for point in batch]


def without_gates(cfg: Config) -> Size:
    moe = cfg.model.moe
    gates = len(cfg.model.moe_layers) * moe.gate.num_parameters(dim=cfg.model.dim, num_experts=moe.num_experts)
    found = size(cfg.model)
    return Size(found.total - gates, found.active - gates, found.matmul - gates)


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_is_legal_and_the_claim_holds(name: str) -> None:
    found = []
    base = [] if "override /experiment" in (folder() / f"sweep/{name}.yaml").read_text() else ["experiment=quickstart"]
    for point in points(name):
        cfg = OmegaConf.to_object(hydra.compose("train", overrides=[f"sweep={name}", *base, *point]))
        assert isinstance(cfg, Config)
        check(cfg, world=wanted_ranks(cfg.layout, device=cfg.train.device))
        found.append(cfg)
    assert len(found) > 1
    assert len({repr(cfg) for cfg in found}) == len(found), "two points are the same job"
    sizes = [without_gates(cfg) for cfg in found]
    assert len({s.active for s in sizes}) == 1
    assert len({s.matmul for s in sizes}) == 1
    totals = [s.total for s in sizes]
    if name in GROWING:
        assert totals == GROWING[name](totals)
        assert len(set(totals)) == len(totals)
    else:
        assert len(set(totals)) == 1


def test_a_sweep_is_many_jobs(capsys) -> None:
    for command in ("train", "memory"):
        assert main([command, "sweep=balance"]) == 2
        assert "sweep=balance is many jobs, and this is one: moetrain train -m" in capsys.readouterr().err
    assert main(["train", "-m", "+sweep=balance,capacity"]) == 2
    assert "one sweep at a time, for example sweep=balance" in capsys.readouterr().err
    assert main(["train", "-m", "sweep=balanse"]) == 2
    assert "sweep=balanse: no such option; did you mean 'balance" in capsys.readouterr().err
