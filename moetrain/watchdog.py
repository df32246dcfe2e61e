"""A thread beside training, outside of all collectives: where nothing moves, it says who is where and ends the process.

A rank that has been at one place for ``train.timeout`` writes that place to ``hangs/life-<n>/rank-<r>.json`` in the
run's folder, its stacks to its log, and on a GPU torch's flight recorder beside it. A little later each rank reads what
the others wrote: those inside a collective wait for those that have not entered it; one that has written nothing is
stopped, cut off or gone. Then the process ends with exit code 6, so that whoever started it can start it again.
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import time
from pathlib import Path
from threading import Event, Thread

import torch
import torch.distributed as dist

from moetrain.where import Here, here
from moetrain.world import World

HUNG = 6
"""Exit code of a process that its watchdog ends."""
_LISTEN = 5.0
"""Seconds for the others to write where they are: they got stuck up to some looks apart."""
_PAUSE = 1.0
"""Seconds by which a look is late where the process, or its machine, stood still."""
_UNWATCHED = "starting", "loading", "saving"
"""Parts that may take long and wait for disks; their collectives have limits of their own."""


class Watchdog:
    def __init__(self, world: World, folder: Path, *, life: int, log: logging.Logger) -> None:
        self.world, self.log, self.limit = world, log, world.watch
        self.folder = folder / "hangs" / f"life-{life:08d}"
        self._closed = Event()
        Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        look = min(1.0, self.limit / 10)
        seen = time.monotonic()
        while not self._closed.wait(look):
            still, seen = time.monotonic() - seen - look, time.monotonic()
            if still > _PAUSE:
                self.log.warning(
                    f"rank {self.world.rank} stood still for {still:.1f} s, in {here.part} of step {here.step}: its "
                    f"process was stopped, or its machine gave it no time"
                )
            # a process that was stopped itself finds its own past: it waits for the next look
            late = still > _PAUSE + 2 * look
            if not late and here.part not in _UNWATCHED and seen - here.since > self.limit:
                self._hung()

    def _hung(self) -> None:
        mine = vars(here) | {"words": here.words(), "seconds": time.monotonic() - here.since}
        path = self.folder / f"rank-{self.world.rank}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(mine))
            os.replace(path.with_suffix(".tmp"), path)
            self._record()
        except OSError as error:
            self.log.error(f"{self.folder} cannot be written: {error}")
        self.log.error(f"a hang: for {mine['seconds']:.0f} s rank {self.world.rank} is {mine['words']}; its stacks:")
        for handler in self.log.handlers:
            if isinstance(handler, logging.FileHandler):
                faulthandler.dump_traceback(file=handler.stream)  # pyright: ignore[reportArgumentType]
        self._closed.wait(_LISTEN)
        if self._closed.is_set() or time.monotonic() - here.since < self.limit:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # it went on after all
            return
        for line in told(self.folder, self.world.size):
            self.log.error(line)
        if self.world.main:
            print("\n".join(told(self.folder, self.world.size)), file=sys.stderr, flush=True)
        os._exit(HUNG)

    def _record(self) -> None:
        """torch's flight recorder, of NCCL's collectives."""
        if dist.is_initialized() and self.world.device.type == "cuda":
            for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # torch 2.13, and before it
                if dump := getattr(torch._C._distributed_c10d, name, None):  # pyright: ignore
                    (self.folder / f"flight-recorder-{self.world.rank}.json").write_bytes(dump())
                    break


def told(folder: Path, ranks: int) -> list[str]:
    """Who is where, by what the ranks wrote; one line for each place, then those that wrote nothing."""
    places: dict[str, list[int]] = {}
    for rank in range(ranks):
        try:
            found = json.loads((folder / f"rank-{rank}.json").read_text())
        except (OSError, ValueError):
            continue
        here = Here(**{k: v for k, v in found.items() if k not in ("words", "seconds")})
        places.setdefault(here.words(), []).append(rank)
    lines = [f"hang: {_named(who)} {'is' if len(who) == 1 else 'are'} {words}" for words, who in places.items()]
    if silent := sorted(set(range(ranks)) - {rank for who in places.values() for rank in who}):
        it = "it" if len(silent) == 1 else "them"
        lines.append(f"hang: {_named(silent)} said nothing: stopped, cut off or gone; the others wait for {it}")
    return lines


def _named(ranks: list[int]) -> str:
    """Runs of ranks in words."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
