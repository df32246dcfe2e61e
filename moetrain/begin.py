"""The beginning of a life: it takes over from the one before, and goes on from its newest whole checkpoint."""

import logging
from functools import partial
from pathlib import Path

from moetrain import checkpoint, resume, where
from moetrain.job import Config, checkpoints
from moetrain.train import Trainer


def begin(trainer: Trainer, log: logging.Logger) -> checkpoint.Life:
    """Take over the run's checkpoints, and load the one that it goes on from, if there is one. Collective."""
    root = checkpoints(trainer.cfg)
    wire = checkpoint.Wire(trainer.world.host_group)
    before, number = wire.decide(lambda: (checkpoint.last_word(root), checkpoint.take_over(root).number))
    life = trainer.life = checkpoint.Life(root, number)
    log.info(f"life {number} of the run begins" + (f"; {before}" if before else ""))
    if not _load(trainer, log, upto=None):
        log.info(f"starting anew: no committed checkpoint in {root}")
    return life


def go_back(trainer: Trainer, log: logging.Logger, *, upto: int) -> bool:
    """To the run's newest whole checkpoint of no later a step, if there is one. Collective."""
    return _load(trainer, log, upto=upto)


def _load(trainer: Trainer, log: logging.Logger, *, upto: int | None) -> bool:
    where.at("loading")
    cfg, life = trainer.cfg, trainer.life
    wire = checkpoint.Wire(trainer.world.host_group)
    while start := resume.from_json(
        wire.decide(lambda: resume.to_json(resume.first(cfg, life, log=log.error, upto=upto)))
    ):
        try:
            report = trainer.load(start)
            break
        except checkpoint.DamagedError as error:
            wire.decide(partial(_pass_over, cfg, start.folder, error, life, log))
    else:
        return False
    if start.own and life:  # those of steps that come again
        wire.decide(partial(_set_newer_aside, start.folder, life, log))
    words = "the weights of " if start.weights_only else ""
    log.info(f"resumed from {words}{start.folder} at step {trainer.steps}, {trainer.consumed} samples seen")
    log.info(
        f"{len(report.restored)} tensors restored, newly initialised: {_names(report.missing)}; unused: "
        f"{_names(report.unused)}"
    )
    for line in start.lines:
        log.info(f"changed since: {line}")
    return True


def _pass_over(cfg: Config, folder: Path, error: checkpoint.DamagedError, life: checkpoint.Life | None, log) -> None:
    resume.pass_over(cfg, folder, error, life, log=log.error)


def _set_newer_aside(folder: Path, life: checkpoint.Life, log: logging.Logger) -> None:
    for newer in checkpoint.marked(folder.parent):
        if (checkpoint.step_of(newer) or 0) > (checkpoint.step_of(folder) or 0):
            log.info(
                f"{newer} is newer than where this life begins: it lies in {checkpoint.set_aside(newer, life=life)} now"
            )


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
