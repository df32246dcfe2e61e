"""When a run should save and leave before it is done: all ranks agree on it, at the same step, and nobody waits.

    SIGTERM, SIGUSR1     to any rank
    a file ``stop``      in the run's folder
    ``run.time_limit``   minutes of a life, less what a save and a few steps take
    another life         that has taken over the run's checkpoints

Each step's reasons travel, by a group of their own, while the next step computes, and are read after it.
"""

import time
from enum import Enum
from pathlib import Path

import torch
import torch.distributed as dist

from moetrain import signals
from moetrain.checkpoint import Life
from moetrain.world import World

_LOOK = 1.0
"""Seconds between looks at the disk."""
_STARTED = time.monotonic()


class Why(Enum):
    signal = "a signal"
    file = "the file stop in its folder"
    superseded = "another life of the run"
    limit = "run.time_limit"


class Stop:
    """One rank's. Signals are caught from its making to ``close``."""

    def __init__(self, world: World, folder: Path, *, limit: float | None, life: Life | None) -> None:
        """``limit``: minutes since this process began; ``life`` is asked whether it lasts."""
        self.world, self.file, self.limit, self.life = world, folder / "stop", limit, life
        self.saving = 0.0  # seconds that the longest save took
        self._looked, self._found = 0.0, [False, False]
        self._on_its_way: tuple[dist.Work | None, torch.Tensor] | None = None
        self._group = world.new_host_group()
        signals.catch()

    def step(self, seconds: float) -> "Why | None":
        """After each step, which took so long, collective: why to leave now, the same on every rank; None: go on."""
        mine = torch.tensor([bool(signals.caught), *self._looks(), self._late(seconds)], dtype=torch.int32)
        before = self._on_its_way
        work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group, async_op=True) if self._group else None
        self._on_its_way = work, mine
        if before is None:
            return None
        if before[0] is not None:
            before[0].wait()
        return next((why for why, said in zip(Why, before[1].tolist(), strict=True) if said), None)

    def _looks(self) -> list[bool]:
        """At the disk, by rank 0: whether the file is there, whether the life is over."""
        if self.world.main and time.monotonic() >= self._looked + _LOOK:
            self._looked = time.monotonic()
            self._found = [self.file.exists(), self.life is not None and not self.life.lasts]
        return self._found

    def _late(self, seconds: float) -> bool:
        """Whether a few steps from now there would be no time left to save."""
        if self.limit is None:
            return False
        return time.monotonic() - _STARTED + 3 * seconds + 2 * self.saving + 10 > 60 * self.limit

    def close(self) -> None:
        if self._on_its_way is not None and self._on_its_way[0] is not None:
            self._on_its_way[0].wait()
        self._on_its_way = None
        signals.release()
