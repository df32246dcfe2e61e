"""``moetrain train``: the same arguments start the local ranks, or, under torchrun, are one rank."""

import json

from moetrain import config as configs
from moetrain.cli.compose import HYDRA_FLAGS, compose, with_hydra
from moetrain.cli.ranks import be_rank, start_ranks
from moetrain.config import UserError
from moetrain.job import Config, preflight
from moetrain.model.flops import size
from moetrain.world import launched, wanted_ranks


def main(argv: list[str]) -> int:
    sweep = "-m" in argv or "--multirun" in argv
    if sweep and launched():
        raise UserError(
            "-m inside torchrun would sweep once on every rank: run `moetrain train -m ...`, which starts each job's "
            "ranks itself"
        )
    if "--config" not in argv and any(word.split("=")[0] in HYDRA_FLAGS for word in argv):
        if "--cfg" in argv or "-c" in argv:
            print(f"# {size(compose(_overrides(argv)).model)}", flush=True)
        with_hydra(argv, _sweep_job)
        return 0
    cfg = compose(argv)
    if launched():
        return be_rank(cfg, checked=False)
    return _start(cfg)


def _start(cfg: Config) -> int:
    world = wanted_ranks(cfg.layout, device=cfg.train.device)
    preflight(cfg, world=world, log=lambda line: print(line, flush=True))
    configs.write(cfg, cfg.run.folder / "config.yaml")
    return be_rank(cfg, checked=True) if world == 1 else start_ranks(cfg.run.folder, ranks=world)


def _sweep_job(cfg: Config) -> float | None:
    """One job of a sweep; its held-out loss is what a sweeper minimizes."""
    if code := _start(cfg):
        raise RuntimeError(f"{cfg.run.folder} failed with exit code {code}: see its logs/")
    path = cfg.run.folder / "summary.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    losses = [s["nats_per_token"] for s in scores.values() if isinstance(s, dict)]
    return sum(losses) / len(losses) if losses else None


def _overrides(argv: list[str]) -> list[str]:
    return [word for word in argv if "=" in word and not word.startswith("-")]
