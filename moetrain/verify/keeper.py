"""The process that keeps local ranks: imports torch once, forks them, hands them jobs, forks new ones after a failure.

A line on stdin is the seconds that a job may take and the job; a line on stdout is its end. Read ``Keeper.run`` first.
Ranks die with this process and it with the one that started it, however that ends.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain.config import UserError
from moetrain.verify.ranks import Job, perform
from moetrain.world import die_with, join

_PRELOAD = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "moetrain.moe")
"""torch imports some of these lazily, which would cost every rank seconds; the last registers the options."""

_GRACE = (
    0.5  # seconds: one rank's error makes the others' connections fail, and the first to speak may not be the cause
)
_LONG = 86400.0  # seconds of a collective: who waits too long is decided here, for the job as a whole
_CONNECTION = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|connectFullMesh")


@dataclass
class _Life:
    """Ranks that have met: process ids, where each takes its jobs, where all report."""

    pids: list[int]
    jobs: list[int]
    reports: int
    fault: str | None
    folder: Path
    heard: str = ""


class Keeper:
    def __init__(self, size: int, *, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.life: _Life | None = None
        self.lives = 0

    def run(self, text: str, *, timeout: float) -> str | None:
        """Hand the job to every rank and wait for all of them; what went wrong, in a line."""
        job = json.loads(text)
        if self.life is not None and self.life.fault != job["fault"]:
            self.end()
        if self.life is None:
            self.life = self._fork(job["fault"])
        error = self._wait(self.life, text, timeout)
        if error is not None:
            self.end()
        return error

    def end(self) -> None:
        """Kill the ranks."""
        if self.life is not None:
            for pid in self.life.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in self.life.pids:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            for fd in (*self.life.jobs, self.life.reports):
                os.close(fd)
            self.life = None

    def _wait(self, life: _Life, text: str, timeout: float) -> str | None:
        deadline = time.monotonic() + timeout
        for fd in life.jobs:
            with contextlib.suppress(BrokenPipeError):  # a rank that is dead is found below
                _write(fd, text)
        waiting, errors, dead = set(range(self.size)), {}, {}
        while waiting and time.monotonic() < deadline:
            for rank, error in _reports(life, seconds=0.05):
                waiting.discard(rank)
                if error is not None:
                    errors[rank] = error
            for rank in sorted(waiting | set(errors)):
                if rank not in dead and (code := _ended(life.pids[rank])) is not None:
                    dead[rank] = code
                    waiting.discard(rank)
            if errors or dead:
                deadline = min(deadline, time.monotonic() + _GRACE)
                if len(errors) + len(dead) == self.size:
                    break
        if killed := [f"rank {rank} died ({code})" for rank, code in dead.items() if rank not in errors]:
            return ", ".join(killed)
        if errors:
            causes = {rank: error for rank, error in errors.items() if not _CONNECTION.search(error)}
            rank, error = next(iter((causes or errors).items()))
            return f"rank {rank}: {error}"
        if waiting:
            where = {rank: _stack(life, rank) for rank in sorted(waiting)}
            places = ", ".join(dict.fromkeys(where.values()))
            names = ", ".join(map(str, where))
            return f"not done after {timeout:g} s: rank{'s' * (len(where) > 1)} {names} in {places}"
        return None

    def _fork(self, fault: str | None) -> _Life:
        folder = self.folder / f"life-{self.lives}"
        self.lives += 1
        folder.mkdir(parents=True, exist_ok=True)
        store = folder / "store"
        store.unlink(missing_ok=True)
        reports, write = os.pipe()
        life = _Life([], [], reports, fault, folder)
        keeper = os.getpid()
        for rank in range(self.size):
            read, jobs = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    die_with(keeper)
                    for fd in (*life.jobs, jobs, reports):
                        os.close(fd)
                    _be_rank(rank, self.size, jobs=read, reports=write, folder=folder)
                finally:
                    os._exit(0)  # never up the keeper's stack, which would end the other ranks
            os.close(read)
            life.pids.append(pid)
            life.jobs.append(jobs)
        os.close(write)
        return life


def _be_rank(rank: int, size: int, *, jobs: int, reports: int, folder: Path) -> None:
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # stdin is the keeper's
    stack = open(folder / f"stack-{rank}", "w")  # noqa: SIM115 (written to for as long as the rank lives)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    world = mesh = None
    for line in os.fdopen(jobs):
        error = None
        try:
            job = Job.decode(line)
            if world is None:
                t = job.cfg.train
                store = FileStore(str(folder / "store"), size)
                world = join(device=t.device, communication=t.communication, timeout=_LONG, threads=1, store=store)
            mesh = perform(job, world, mesh)
        except BaseException as e:
            traceback.print_exc()
            error = _line(e)
        gc.collect()
        _write(reports, json.dumps([rank, error]))


def _line(error: BaseException) -> str:
    """An exception as one line, short enough for a pipe to take it whole."""
    text = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, UserError):
        return text[:2000]
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "moetrain" in f.filename]
    where = f" ({_short(ours[-1].filename)}:{ours[-1].lineno} in {ours[-1].name})" if ours else ""
    return f"{type(error).__name__}: {text[:1500]}{where}"


def _stack(life: _Life, rank: int) -> str:
    """Where a rank that does not answer is: the innermost line of ours."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(life.pids[rank], signal.SIGUSR1)
        time.sleep(0.2)
    text = (life.folder / f"stack-{rank}").read_text()
    main = text[text.rfind("(most recent call first)") :]
    found = re.search(r'File "([^"]*/moetrain/[^"]*)", line (\d+) in (\w+)', main)
    return f"{_short(found[1])}:{found[2]} in {found[3]}" if found else "a place that is unknown"


def _short(filename: str) -> str:
    return filename[filename.rfind("moetrain/") :]


def _reports(life: _Life, *, seconds: float) -> list[tuple[int, str | None]]:
    """What ranks have said since the last call; waits for the first so long."""
    if select.select([life.reports], [], [], seconds)[0]:
        data = os.read(life.reports, 1 << 16)
        if not data:  # nobody is left to say anything
            time.sleep(seconds)
        *lines, life.heard = (life.heard + data.decode()).split("\n")
        return [tuple(json.loads(line)) for line in lines]
    return []


def _ended(pid: int) -> str | None:
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return "ended"
    if not found:
        return None
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _write(fd: int, line: str) -> None:
    data = line.rstrip("\n").encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def main() -> int:
    size, folder, parent = sys.argv[1:]
    die_with(int(parent))
    torch.set_num_threads(1)  # a fork of a process that has used several would hang in its first parallel loop
    for name in _PRELOAD:
        importlib.import_module(name)
    keeper = Keeper(int(size), folder=Path(folder))
    try:
        for line in sys.stdin:
            timeout, _, job = line.partition(" ")
            print(json.dumps({"error": keeper.run(job, timeout=float(timeout))}), flush=True)
    finally:
        keeper.end()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
