"""Which rank the others wait for: each rank's time outside of collectives, over the steps between two looks.

Where the host runs the collectives (gloo): on a GPU it only queues them, and nothing is said.
"""

from statistics import median
from typing import Any

import torch
from torch import Tensor

from moetrain.where import here
from moetrain.world import World, on_cpu


class Skew:
    def __init__(self, world: World, *, warn: float) -> None:
        """``warn``: times the median, from which on the slowest rank is named; 0: never."""
        self.world, self.warn = world, warn
        self.on = world.size > 1 and on_cpu(world.device)
        self.record: dict[str, Any] | None = None  # of the last look: rank, seconds of a step, the ranks' median
        self._waited = here.waited
        self._named: int | None = None

    def part(self, seconds: float, *, steps: int, like: Tensor) -> Tensor:
        """(ranks,) whose sum over ranks is for ``read``; of this many steps, which took so many seconds."""
        own_R = torch.zeros(self.world.size if self.on else 0, dtype=like.dtype, device=like.device)
        if self.on:
            own_R[self.world.rank] = (seconds - (here.waited - self._waited)) / steps
        self._waited = here.waited
        return own_R

    def read(self, own: list[float]) -> None:
        if own:
            slowest = max(range(len(own)), key=own.__getitem__)
            self.record = {"rank": slowest, "seconds": own[slowest], "median": median(own)}

    def news(self) -> str | None:
        """The slowest rank, where it is that slow and was not at the last look."""
        r = self.record
        slow = r is not None and self.warn > 0 and r["seconds"] > self.warn * r["median"]
        before, self._named = self._named, r["rank"] if slow and r else None
        if r is None or self._named in (None, before):
            return None
        return (
            f"rank {r['rank']} is the slowest: {r['seconds']:.3f} s of a step outside of collectives, the median rank "
            f"{r['median']:.3f} s; the others wait for it"
        )
