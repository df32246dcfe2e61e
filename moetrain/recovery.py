"""What a run does about bad steps: say which and where, keep one for a replay, and after several in a row go back."""

import logging
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain import checkpoint, origin
from moetrain.begin import go_back
from moetrain.train import StepResult, Trainer


@dataclass(frozen=True)
class _Step:
    """A step that may have been bad."""

    before: int  # steps before it
    consumed: int  # samples before it
    told_5: Tensor  # on the host: bad, loss, norm, their limits
    ready: torch.cuda.Event | None

    @property
    def words(self) -> str:
        _, *values, loss_limit, norm_limit = self.told_5.tolist()
        pairs = zip(("loss", "gradient norm"), values, (loss_limit, norm_limit), strict=True)
        return ", ".join(f"{what} {x:.4g}" + (f" (limit {at:.4g})" if at < torch.inf else "") for what, x, at in pairs)


class Recovery:
    """One rank's; all of them see the same and call it alike. On a GPU it looks at a step after the next is queued."""

    def __init__(self, trainer: Trainer, log: logging.Logger) -> None:
        self.trainer, self.cfg, self.log = trainer, trainer.cfg.bad_steps, log
        self.bad: list[_Step] = []  # in a row
        self.rewinds = self.kept = 0  # of this life
        self._steps: deque[_Step] = deque()

    def after(self, before: int, consumed: int, result: StepResult) -> bool:
        """Of a step that ``before`` others came before: whether to ``go_back``. Collective where it is bad."""
        if (verdict := result.verdict) is None:
            return False
        told = torch.cat([verdict.bad.double()[None], verdict.values_2, verdict.limits_2])
        ready = None
        if told.is_cuda:
            told = torch.empty_like(told, device="cpu", pin_memory=True).copy_(told, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._steps.append(_Step(before, consumed, told, ready))
        last = before + 1 == self.trainer.cfg.train.steps
        while self._steps and (ready is None or last or len(self._steps) > 1):
            self._look(self._steps.popleft())
        return 0 < self.cfg.rewind_after <= len(self.bad)

    def _look(self, step: _Step) -> None:
        if step.ready:
            step.ready.synchronize()
        if not step.told_5[0]:
            self.bad.clear()
            return
        self.bad.append(step)
        self.log.error(f"step {step.before + 1} is bad and skipped: {step.words}")
        if len(self.bad) > 1 or self.kept >= self.cfg.replays:
            return
        self.kept += 1
        trainer, now = self.trainer, (self.trainer.steps, self.trainer.consumed)
        trainer.steps, trainer.consumed = step.before, step.consumed
        try:
            self._keep(step)
            found = origin.first_not_finite(trainer)
        finally:
            trainer.steps, trainer.consumed = now
        again = f"first not finite in {'; '.join(found)}" if found else "all of it is finite"
        self.log.error(f"step {step.before + 1} run again: {again}")

    def _keep(self, step: _Step) -> None:
        """The state before it, as a checkpoint apart from the run's."""
        trainer = self.trainer
        folder = checkpoint.step_folder(trainer.cfg.run.folder / "bad-steps", step.before + 1)
        tensors, meta = trainer.state()
        meta["bad"] = {"step": step.before + 1, "words": step.words}
        try:
            checkpoint.save(folder, tensors, meta, group=trainer.world.host_group)
        except Exception as error:
            self.log.error(f"{folder} is not saved, and the run goes on: {type(error).__name__}: {error}")
        else:
            self.log.error(f"the state before it is kept: moetrain replay {folder}")

    def go_back(self) -> None:
        """To the last checkpoint before the bad steps in a row, on without their samples. Collective.

        Raises ``RuntimeError`` where there is none, or it has been done too often.
        """
        trainer, first = self.trainer, self.bad[0]
        words = f"steps {first.before + 1} to {trainer.steps} are bad, the last with {self.bad[-1].words}"
        self.rewinds += 1
        if self.rewinds > self.cfg.rewinds:
            raise RuntimeError(
                f"{words}: given up after {self.rewinds - 1} times back to a checkpoint (bad_steps.rewinds); nothing "
                f"of the bad steps is in the weights or saved"
            )
        first_sample, count = first.consumed, trainer.consumed - first.consumed
        trainer.samples.skip(first_sample, count)
        skipped = [list(run) for run in trainer.skipped]
        if not go_back(trainer, self.log, upto=first.before):
            raise RuntimeError(f"{words}, and no checkpoint of the run is there to go back to: lower checkpoint.every")
        trainer.skipped[:] = skipped
        self.bad.clear()
        self._steps.clear()
        self.log.error(f"{words}: back to step {trainer.steps}, on without the samples of the bad steps ({count})")
