"""``moetrain train``: the same arguments start the local ranks, or, under torchrun, are one rank."""

import os
from pathlib import Path

from moetrain import caches
from moetrain import config as configs
from moetrain.cli.compose import HYDRA_FLAGS, SWEEP, compose, with_hydra
from moetrain.cli.ranks import be_rank, start_ranks
from moetrain.cli.sweep import summary
from moetrain.config import UserError
from moetrain.job import Config, check_here
from moetrain.model.flops import size
from moetrain.report.points import Status, read
from moetrain.resume import preflight
from moetrain.world import die_with, launched, wanted_ranks


def main(argv: list[str]) -> int:
    if ("-m" in argv or "--multirun" in argv) and launched():
        raise UserError(
            "-m inside torchrun would sweep once on every rank: run `moetrain train -m ...`, which starts each job's "
            "ranks itself"
        )
    if "--config" not in argv and any(word.split("=")[0] in HYDRA_FLAGS for word in argv):
        if ("--cfg" in argv or "-c" in argv) and not any(word.startswith(SWEEP) for word in argv):
            print(f"# {size(compose(_overrides(argv)).model)}", flush=True)
        sweep = with_hydra(argv, _sweep_job)
        return _swept(sweep) if sweep else 0
    cfg = compose(argv)
    caches.keep_in(cfg.run.caches)
    if launched():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with(os.getppid())
        return be_rank(cfg, checked=False)
    return _start(cfg)


def _start(cfg: Config) -> int:
    """Raises ``UserError`` before anything is started; returns an exit code."""
    world = wanted_ranks(cfg.layout, device=cfg.train.device)
    check_here(cfg)
    preflight(cfg, world=world, log=lambda line: print(line, flush=True))
    configs.write(cfg, cfg.run.folder / "config.yaml")
    if world == 1 and not cfg.run.restarts:
        return be_rank(cfg, checked=True)
    return start_ranks(cfg.run.folder, ranks=world, restarts=cfg.run.restarts)


def _sweep_job(cfg: Config) -> str:
    """One job of a sweep: why it failed, or nothing."""
    caches.keep_in(cfg.run.caches)
    code = _start(cfg)
    return f"exit code {code}, see {cfg.run.folder / 'logs'}" if code else ""


def _swept(sweep: Path) -> int:
    found = [point.status for point in read(sweep)]
    print("\n".join(["", *summary(sweep)]))
    if Status.done in found:
        print(f"compare them: moetrain report {sweep}")
    return 1 if Status.failed in found else 0


def _overrides(argv: list[str]) -> list[str]:
    return [word for word in argv if "=" in word and not word.startswith("-")]
