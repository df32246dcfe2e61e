"""``moetrain replay STATE [KEY=VALUE ...]``: run a bad step again under any layout, and say where it goes wrong."""

import os
import sys
from pathlib import Path

from moetrain import checkpoint, origin
from moetrain import config as configs
from moetrain.cli.compose import compose
from moetrain.cli.ranks import start_ranks
from moetrain.config import UserError
from moetrain.job import Config, open_data
from moetrain.resume import Start
from moetrain.train import Trainer
from moetrain.world import die_with, join, leave, wanted_ranks


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: moetrain replay STATE [KEY=VALUE ...]\n\n{__doc__}")
        print("\nSTATE is a folder in a run's bad-steps/; keys are those of the config, layout.* above all.")
        return 0 if argv else 2
    folder = Path(argv[0])
    meta = checkpoint.read_meta(folder)
    if "bad" not in meta:
        raise UserError(f"{folder} is a checkpoint, not the state before a bad step: give a folder in bad-steps/")
    print(f"step {meta['bad']['step']} was bad: {meta['bad']['words']}", flush=True)
    here = folder.with_name(f"{folder.name}.replay")
    here.mkdir(exist_ok=True)
    path = here / "config.yaml"
    configs.write(configs.load(meta["config"], Config), path)
    cfg = compose(["--config", str(path), *argv[1:]])
    configs.write(cfg, path)
    world = wanted_ranks(cfg.layout, device=cfg.train.device)
    if world == 1:
        return _replay(path, folder)
    return start_ranks(here, ranks=world, program=("-m", "moetrain.cli.replay", str(path), str(folder)))


def _replay(config: Path, folder: Path) -> int:
    cfg = configs.read(config, Config)
    t = cfg.train
    world = join(device=t.device, communication=t.communication, timeout=t.timeout, threads=t.threads)
    trainer = Trainer(cfg, world, open_data(cfg, log=lambda line: None))
    trainer.load(Start(folder))
    found = origin.first_not_finite(trainer)
    result = trainer.step()
    if world.main and result.verdict is not None:
        loss, norm = result.verdict.values_2.tolist()
        bad = "bad again" if result.verdict.bad else "not bad this time"
        print(f"step {trainer.steps} on {world.size} rank(s): {bad}: loss {loss:.6g}, gradient norm {norm:.6g}")
        print("\n".join(f"first not finite in {line}" for line in found) or "all of it is finite", flush=True)
    leave(world)
    return 0


if __name__ == "__main__":
    die_with(int(os.environ["MOETRAIN_PARENT"]))
    raise SystemExit(_replay(Path(sys.argv[1]), Path(sys.argv[2])))
