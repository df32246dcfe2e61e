"""A torch profiler trace of chosen steps and ranks, and what is remembered of a GPU's memory for when it runs out."""

import contextlib
import gzip
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from threading import Thread

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.config import UserError, config

_AFTER, _STEPS = 10, 3
"""Without ``trace.steps``: that many steps of a life come before, and so many are traced."""
_HISTORY = 100_000
"""Allocations and frees that are remembered with ``trace.memory``."""


@config
class TraceConfig:
    """``trace=true`` on the command line: ``enabled``. ``steps`` or ``ranks`` alone are enough, too."""

    enabled: bool = False
    steps: list[int] | None = None  # the first and the last, of the run; None = three, after ten of this life
    ranks: list[int] = field(default_factory=list)  # [] = rank 0
    memory: bool = False  # on GPUs, who allocated what is kept, and written down where memory runs out

    def __post_init__(self) -> None:
        if self.steps is not None and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise UserError(
                f"trace.steps={self.steps}: give the first and the last step to trace, for example trace.steps=[10,12]"
            )

    def check(self, world: int) -> None:
        if wrong := [rank for rank in self.ranks if not 0 <= rank < world]:
            raise UserError(f"trace.ranks={self.ranks}: there is no rank {wrong[0]}, use 0 to {world - 1}")


class Trace:
    """One rank's, of one life that begins after step ``at``."""

    def __init__(
        self, cfg: TraceConfig, folder: Path, *, rank: int, at: int, device: torch.device, log: logging.Logger
    ) -> None:
        first, last = cfg.steps or (at + _AFTER + 1, at + _AFTER + _STEPS)
        wanted = (cfg.enabled or cfg.steps is not None or bool(cfg.ranks)) and rank in (cfg.ranks or [0])
        self.first, self.last = (max(first, at + 1), last) if wanted else (0, -1)
        self.path = folder / "traces" / f"steps-{self.first:08d}-{self.last:08d}-rank-{rank}.json.gz"
        self.device, self.log = device, log
        self._profile: profile | None = None
        self._writer: Thread | None = None
        if cfg.memory and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; of those that are not traced it costs two comparisons."""
        if not self.first <= number <= self.last:
            yield
            return
        if self._profile is None:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
            self._profile = profile(activities=kinds)
            self._profile.start()
        with record_function(f"step {number}"):
            yield
        if number == self.last:
            self._stop()

    def _stop(self) -> None:
        """The steps after it go on while it is written."""
        if self._profile is None:
            return
        done, self._profile = self._profile, None
        self.first, self.last = 0, -1
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the last step's kernels are part of it
            done.stop()
        except Exception as error:
            self.log.warning(f"{self.path} is not written: {type(error).__name__}: {error}")
            return
        self._writer = Thread(target=self._write, args=(done,), name="trace", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Until what there is is written, for a minute."""
        self._stop()
        if self._writer is not None:
            self._writer.join(60)

    def _write(self, done: profile) -> None:
        since, half = time.perf_counter(), self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(exist_ok=True)
            done.export_chrome_trace(str(half))  # torch would compress by way of the temporary folder
            with half.open("rb") as plain, gzip.open(f"{half}.gz", "wb", compresslevel=5) as packed:
                shutil.copyfileobj(plain, packed)
            half.unlink()
            os.replace(f"{half}.gz", self.path)
        except Exception as error:
            self.log.warning(f"{self.path} is not written, and the run goes on: {type(error).__name__}: {error}")
        else:
            self.log.info(
                f"trace {self.path}, written in {time.perf_counter() - since:.1f} s: ui.perfetto.dev shows it"
            )
