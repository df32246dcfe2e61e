"""Ranks for tests: ``RankPool(world).run(fn, *args)`` runs ``fn(rank, world, *args)`` on forked, persistent gloo ranks.

A call costs a process group (tens of ms), not an interpreter: the parent has imported torch, the ranks are forked from
it once, and each call gets a new world group, so that no subgroup leaks from one test into the next. ``fn`` and its
arguments travel by pickle: a module-level function of a test file that was imported before the ranks were forked.
"""

import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist

PRELOAD = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.pipelining",
)
"""Imported before the fork: torch imports these lazily, which would cost seconds in each rank."""

GRACE = 1.0
"""Seconds that the other ranks have to report once one has failed; then they are taken to be stuck."""


class RankPool:
    """Persistent forked ranks; killed and forked anew after a failure."""

    def __init__(self, world: int, *, timeout: float = 300.0) -> None:
        self.world = world
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = Path()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Returns what ``fn(rank, world, *args)`` returned on each rank; raises ``AssertionError`` with tracebacks.

        A group whose sockets gloo could not connect says nothing about ``fn``: new ranks try again, twice, and say so.
        """
        for _ in range(2):
            try:
                return self._run(fn, *args)
            except AssertionError as error:
                if "connectFullMesh" not in str(error):
                    raise
                warnings.warn(f"gloo could not connect its ranks, trying again:\n{error}", stacklevel=2)
        return self._run(fn, *args)

    def _run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        call = pickle.dumps((fn, args))
        if not self._processes:
            self._fork()
        deadline = time.monotonic() + self.timeout
        for pipe in self._pipes:
            pipe.send_bytes(call)
        pending = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while pending and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(pending), timeout=left):
                rank = pending.pop(pipe)  # pyright: ignore[reportArgumentType]
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())  # pyright: ignore[reportAttributeAccessIssue]
                except EOFError:
                    self._processes[rank].join(1.0)
                    ok, value = False, f"died (exit code {self._processes[rank].exitcode})"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures or pending:
            stuck = {rank: self._stack(rank) for rank in pending.values()}
            self.close()
            lines = [f"failed ranks {sorted(failures)}, stuck ranks {sorted(stuck)}"]
            lines += [f"[rank {rank}] {text}" for rank, text in sorted(failures.items())]
            lines += [f"[rank {rank}, stuck] {text}" for rank, text in sorted(stuck.items())]
            raise AssertionError("\n".join(lines))
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """Kills the ranks; the next ``run`` forks new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._processes:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes = [], []

    def _fork(self) -> None:
        # A child forked from a parent that has used OpenMP with several threads deadlocks in its first parallel loop.
        torch.set_num_threads(1)
        for name in PRELOAD:
            importlib.import_module(name)
        self._folder = Path(tempfile.mkdtemp(prefix="rankpool-"))
        context = multiprocessing.get_context("fork")
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, self._folder, theirs, self.timeout), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def _stack(self, rank: int) -> str:
        path = self._folder / f"stack{rank}"
        if self._processes[rank].is_alive():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.2)
        return path.read_text() if path.exists() else "no stack"


def _serve(rank: int, world: int, folder: Path, pipe: Connection, timeout: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    stack = open(folder / f"stack{rank}", "w")  # noqa: SIM115 (faulthandler writes to it for as long as the rank lives)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    call = 0
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:  # the parent is gone
            os._exit(0)
        try:
            fn, args = pickle.loads(message)
            store = dist.FileStore(str(folder / f"store{call}"), world)
            dist.init_process_group(
                "gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=timeout)
            )
            call += 1
            torch.manual_seed(0)
            answer = (True, fn(rank, world, *args))
            dist.destroy_process_group()
            reply = pickle.dumps(answer)
        except BaseException as error:
            reply = pickle.dumps((False, "".join(traceback.format_exception(error))))
        # Plain pickle bytes: the pipe's own pickler would share tensor storage by file descriptor.
        pipe.send_bytes(reply)
        gc.collect()
