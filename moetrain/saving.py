"""Saves beside training: a copy of what this rank writes is taken at once, a thread writes it while steps go on.

stall     wait for the save before (one copy is held at a time), agree that the plan still fits, copy
beside    write, sync, commit, prune: on a process group of its own
failure   said on every rank, and the run goes on from what it has: the next save tries again; one for which the disk
          has no room is not begun
"""

import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import checkpoint, comm
from moetrain.checkpoint import room
from moetrain.checkpoint.writing import Plan, make_plan, write
from moetrain.job import CheckpointConfig
from moetrain.logical import Chunk, Logical
from moetrain.world import World


class Saver:
    """One rank's. Every rank calls it alike; collective."""

    def __init__(self, cfg: CheckpointConfig, world: World, root: Path, life: checkpoint.Life | None) -> None:
        self.cfg, self.world, self.root, self.life = cfg, world, root, life
        self.stalled = self.took = 0.0  # seconds that the last save held up training, and that it took in all
        self._group = world.new_host_group()
        self._plan: Plan | None = None
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._under_way: tuple[Path, Future[float]] | None = None

    def expect(self, tensors: dict[str, Logical], *, first: int, last: int) -> None:
        """Before steps ``first`` to ``last``, collective: raises ``UserError`` where the disk has no room for their
        checkpoints."""
        plan = self._plan = make_plan(tensors, group=self.world.host_group)
        every = self.cfg.every or last
        saves = last // every - (first - 1) // every + (last % every > 0) if first <= last else 0
        wire = checkpoint.Wire(self.world.host_group)
        wire.decide(lambda: room.check(self.root, plan.shapes, keep=self.cfg.keep, saves=saves))

    def save(self, tensors: dict[str, Logical], meta: dict[str, Any], *, log: logging.Logger) -> None:
        """Begin to save step ``meta["step"]``, after the save before has ended."""
        since = time.perf_counter()
        self.finish(log)
        folder = checkpoint.step_folder(self.root, meta["step"])
        short = room.short(self.root, self._plan.shapes) if self._plan and self.world.main else None
        said = [self._plan is None or not self._plan.fits(tensors), short is not None]
        flags = comm.all_reduce_(
            torch.tensor(said, dtype=torch.int32), group=self.world.host_group, op=dist.ReduceOp.MAX
        )
        other, no_room = flags.tolist()
        if other:
            self._plan, self._copies = make_plan(tensors, group=self.world.host_group), {}
        assert self._plan is not None
        future: Future[float] = Future()
        if no_room:
            future.set_exception(short or OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, as rank 0 has found"))
            self._under_way = folder, future
            return
        job = partial(self._write, folder, self._plan, self._copy(tensors), meta)
        # a daemon: a process that ends for another reason does not wait for ranks that are gone
        Thread(target=_fulfil, args=(future, job), name="save", daemon=True).start()
        self._under_way = folder, future
        self.stalled = time.perf_counter() - since

    def _copy(self, tensors: dict[str, Logical]) -> dict[str, Logical]:
        """What this rank writes, as it is now, on the host."""
        assert self._plan is not None
        found = {name: list(logical.chunks) for name, logical in tensors.items()}
        device = self.world.device.type == "cuda"
        for name, i in self._plan.mine:
            chunk = tensors[name].chunks[i]
            x = chunk.tensor.detach()
            if (copy := self._copies.get((name, i))) is None:
                copy = self._copies[name, i] = torch.empty(x.shape, dtype=x.dtype, pin_memory=device)
            copy.copy_(x, non_blocking=device)
            found[name][i] = Chunk(chunk.offsets, copy)
        if device:
            torch.cuda.synchronize(self.world.device)
        return {n: Logical(tensors[n].shape, tensors[n].dtype, tuple(chunks)) for n, chunks in found.items()}

    def _write(self, folder: Path, plan: Plan, tensors: dict[str, Logical], meta: dict[str, Any]) -> float:
        since = time.perf_counter()
        write(folder, plan, tensors, meta, group=self._group, life=self.life)
        if self.world.main and self.cfg.keep:
            checkpoint.prune(self.root, keep=self.cfg.keep, keep_every=self.cfg.keep_every, life=self.life)
        return time.perf_counter() - since

    def poll(self, log: logging.Logger) -> None:
        """Say so if the save under way has ended. Not collective."""
        if self._under_way is not None and self._under_way[1].done():
            self.finish(log)

    def finish(self, log: logging.Logger, *, must: bool = False) -> None:
        """Until nothing is under way. A failure is logged, and raised where the save ``must`` be there."""
        if self._under_way is None:
            return
        (folder, future), self._under_way = self._under_way, None
        try:
            self.took = future.result()
        except Exception as error:
            if must:
                raise
            log.error(f"{folder} is not saved, and the run goes on: {type(error).__name__}: {error}")
        else:
            log.info(f"saved {folder} in {self.took:.2f} s, of which training waited {self.stalled:.3f} s")


def _fulfil(future: Future[float], job: Callable[[], float]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)
