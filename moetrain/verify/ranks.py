"""Ranks that take one step after another: started here and kept for many jobs, or those that a launcher started.

Starting an interpreter costs seconds and a step of a small model a fraction of one, so the local ranks live for as
long as nothing goes wrong (``keeper.py``). A job that fails, hangs or loses a rank ends them all; the next job gets
new ones.
"""

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from moetrain import comm
from moetrain import config as configs
from moetrain.job import Config
from moetrain.mesh import Mesh
from moetrain.verify import faults
from moetrain.verify.outcome import record
from moetrain.world import World, leave

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One step of ``cfg`` on all ranks, or on one that is ``alone``, recorded in ``folder``.

    ``fault``: a fault of moetrain.verify.faults to plant in the ranks first; for the proof that it is found.
    """

    cfg: Config
    folder: Path
    alone: bool = False
    fault: str | None = None

    def encode(self) -> str:
        return json.dumps(vars(self) | {"cfg": configs.dump(self.cfg), "folder": str(self.folder)})

    @staticmethod
    def decode(text: str) -> "Job":
        data = json.loads(text)
        return Job(configs.load(data["cfg"], Config), Path(data["folder"]), data["alone"], data["fault"])


def perform(job: Job, world: World, like: Mesh | None) -> Mesh | None:
    """Be one rank of a job; returns a mesh whose groups the next job may use again."""
    if job.fault is not None:
        with faults.plant(job.fault):
            record(job.cfg, world, job.folder, like=None)
        return like
    if not job.alone:
        return record(job.cfg, world, job.folder, like=like)
    if world.main:
        record(job.cfg, World(0, 1, world.local_rank, 1, world.device, ""), job.folder, like=None)
    return like


class Ranks(ABC):
    """``size`` ranks that jobs are given to, one at a time."""

    size: int

    @abstractmethod
    def run(self, job: Job) -> str | None:
        """What went wrong, in a line, or nothing."""

    @abstractmethod
    def lead(self, decide: Callable[[], T]) -> T:
        """What one process finds out from the outcomes, known to all that called this."""

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End what was started."""


class LocalRanks(Ranks):
    """``size`` processes on this machine, one thread each. ``timeout``: seconds of a job, its start included.

    ``folder`` takes the ranks' logs.
    """

    def __init__(self, size: int, *, folder: Path, timeout: float) -> None:
        self.size, self.folder, self.timeout = size, folder, timeout
        self._keeper: subprocess.Popen[str] | None = None

    def run(self, job: Job) -> str | None:
        keeper = self._start()
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            keeper.stdin.write(f"{self.timeout} {job.encode()}\n")
            keeper.stdin.flush()
            answer = keeper.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = keeper.wait()
            self.close()
            return f"the process that starts the ranks ended with exit code {code}: see {self.folder}/keeper.log"
        return json.loads(answer)["error"]

    def lead(self, decide: Callable[[], T]) -> T:
        return decide()

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.kill()  # its ranks die with it
            self._keeper.wait()
            for pipe in (self._keeper.stdin, self._keeper.stdout):
                assert pipe is not None
                pipe.close()
            self._keeper = None

    def _start(self) -> subprocess.Popen[str]:
        if self._keeper is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            words = [str(self.size), str(self.folder), str(os.getpid())]
            env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            with open(self.folder / "keeper.log", "a") as log:
                self._keeper = subprocess.Popen(
                    [sys.executable, "-m", "moetrain.verify.keeper", *words], env=env, text=True, stderr=log,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                )  # fmt: skip
        return self._keeper


class TheseRanks(Ranks):
    """The ranks of a launcher, of which this process is one: all of them call everything here."""

    def __init__(self, world: World) -> None:
        self.size, self.world = world.size, world
        self._mesh: Mesh | None = None

    def run(self, job: Job) -> str | None:
        self._mesh = perform(job, self.world, self._mesh)
        comm.barrier(self.world.host_group)
        return None

    def close(self) -> None:
        leave(self.world)

    def lead(self, decide: Callable[[], T]) -> T:
        found: list[Any] = [decide() if self.world.main else None]
        if self.world.size > 1:
            dist.broadcast_object_list(found, src=0, group=self.world.host_group)
        return found[0]
