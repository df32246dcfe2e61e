"""A whole life of a run on one rank: start or resume, train, log, validate, save, sum up."""

import logging
import time
import traceback
from contextlib import nullcontext

from moetrain import comm, where
from moetrain import config as configs
from moetrain import out_of_memory as memory
from moetrain.begin import begin
from moetrain.checkpoint import Life
from moetrain.config import UserError
from moetrain.first_lines import describe
from moetrain.job import Config, checkpoints, open_data
from moetrain.loop import Loop, due
from moetrain.saving import Saver
from moetrain.stop import Stop, Why
from moetrain.telemetry.sinks import close_log, open_log
from moetrain.train import CorruptionError, Trainer
from moetrain.watchdog import Watchdog
from moetrain.world import World


class FailedError(RuntimeError):
    """A rank failed; its log file has the traceback."""


class StoppedError(Exception):
    """The run was ended early, by an alert or because somebody ``asked``; it has saved, and can be continued."""

    def __init__(self, words: str, *, asked: bool) -> None:
        super().__init__(words)
        self.asked = asked


def run(cfg: Config, world: World) -> None:
    """Collective: every rank calls it.

    Raises ``UserError`` for what the user can mend, ``StoppedError`` where an alert ends the run, else ``FailedError``.
    """
    folder = cfg.run.folder
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        configs.write(cfg, folder / "config.yaml")
    comm.barrier(world.host_group)
    log = open_log(folder, rank=world.rank, quiet=not world.main)
    try:
        _run(cfg, world, log)
    except (UserError, StoppedError, CorruptionError) as e:
        _to_file(log, str(e))
        raise
    except Exception as e:
        _to_file(log, traceback.format_exc())
        path = folder / "logs" / f"rank-{world.rank}.log"
        told = f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]} (traceback in {path})"
        if memory.ran_out(e):
            told += f"; {memory.hint(cfg, world)}"
            _to_file(log, told)
        raise FailedError(told) from e
    finally:
        close_log(log)


def _to_file(log: logging.Logger, text: str) -> None:
    """To the rank's log file only: the console gets one line from whoever started the rank."""
    log.handlers[0].handle(log.makeRecord("moetrain", logging.ERROR, "", 0, text, (), None))


def _run(cfg: Config, world: World, log: logging.Logger) -> None:
    data = open_data(cfg, log=log.info if world.main else lambda line: None)
    trainer = Trainer(cfg, world, data)
    for line in describe(trainer):
        log.info(line)
    life = begin(trainer, log)
    with life.ending() if world.main else nullcontext():
        _live(trainer, life, log)


def _live(trainer: Trainer, life: Life, log: logging.Logger) -> None:
    cfg, world = trainer.cfg, trainer.world
    stop = Stop(world, cfg.run.folder, limit=cfg.run.time_limit, life=life)
    saver = Saver(cfg.checkpoint, world, checkpoints(cfg), life)
    last = cfg.train.steps
    if cfg.train.exit_after is not None:
        last = min(last, trainer.steps + cfg.train.exit_after)
    saver.expect(trainer.state()[0], first=trainer.steps + 1, last=last)
    loop = Loop(trainer, saver, log)
    watchdog = Watchdog(world, cfg.run.folder, life=life.number, log=log)
    try:
        while trainer.steps < last and not (loop.stopped_by or loop.asked):
            since = time.perf_counter()
            loop.step()
            where.at("asking whether to go on")
            why = stop.step(time.perf_counter() - since)
            if why is Why.superseded:
                raise life.superseded()
            loop.asked = why.value if why and trainer.steps < last else None
            if due(trainer.steps, cfg.train.validate_every) and trainer.steps < cfg.train.steps:
                loop.validate()
            if due(trainer.steps, cfg.checkpoint.every) or trainer.steps == last or loop.stopped_by or loop.asked:
                loop.save(must=trainer.steps == last or bool(loop.stopped_by or loop.asked))
            stop.saving = max(stop.saving, saver.took)
        loop.draw()
        if trainer.steps >= cfg.train.steps:
            loop.finish()
        elif loop.stopped_by:
            raise StoppedError(f"stopped and saved at step {trainer.steps}: {loop.stopped_by}", asked=False)
        elif loop.asked:
            raise StoppedError(
                f"asked to stop by {loop.asked}: saved at step {trainer.steps} of {cfg.train.steps}; the same command "
                f"continues", asked=True,
            )  # fmt: skip
        else:
            log.info(
                f"left at step {trainer.steps} of {cfg.train.steps} (train.exit_after); the same command continues"
            )
    finally:
        watchdog.close()
        stop.close()
        loop.close()
