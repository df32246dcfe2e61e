"""Where this process is: its step, what part of it, which layer, inside which collective since when.

Kept by the thread that trains, read by one that watches (``watchdog.py``); a few assignments, no lock.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Here:
    step: int = 0
    part: str = "starting"  # forward, backward, update, validating, saving, loading
    micro_batch: int = 0
    layer: int | None = None
    collective: str | None = None  # that it is inside
    entered: int = 0  # collectives so far
    waited: float = 0.0  # seconds in them
    since: float = field(default_factory=time.monotonic)  # that nothing has changed

    def words(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        rest = f"{self.part}{layer if self.collective is None else ''} of step {self.step}"
        inside = "" if self.collective is None else f"the {self.collective}{layer}, "
        return f"in {inside}{rest} ({self.entered} collectives so far)"


here = Here()
"""Of the thread that trains."""


def at(part: str, *, step: int | None = None, layer: int | None = None, micro_batch: int | None = None) -> None:
    here.part, here.layer = part, layer
    if step is not None:
        here.step = step
    if micro_batch is not None:
        here.micro_batch = micro_batch
    here.since = time.monotonic()


@contextmanager
def inside(collective: str) -> Iterator[None]:
    """Only around the training thread's own."""
    here.collective, here.since = collective, (since := time.monotonic())
    here.entered += 1
    try:
        yield
    finally:
        here.since = time.monotonic()
        here.collective, here.waited = None, here.waited + here.since - since
