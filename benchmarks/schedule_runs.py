"""Schedules run on real ranks of this machine, and what each rank did when. Read ``measure`` first."""

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import torch.distributed as dist
from schedule_counts import (
    WORK,
    Line,
    Span,
    Times,
)  # fmt: skip
from torch import Tensor
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain import deferred
from moetrain.cli.compose import compose
from moetrain.job import open_data
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.model.transformer import ModelConfig, Stage
from moetrain.parallel import pipeline
from moetrain.parallel.pipeline import Pipeline
from moetrain.parallel.schedules import Action, Kind, PipelineConfig, Schedule, Table, table
from moetrain.train import Trainer
from moetrain.world import Communication, Device, World, die_with, join, leave

BATCH, SEQ_LEN, DIM = 1, 256, 256  # of what stages pass: 256 KiB
CHUNKS = 2


@dataclass(frozen=True)
class Case:
    schedule: Schedule
    pp: int
    micro_batches: int
    times: Times  # of a chunk, of which there are 2 pp

    @property
    def config(self) -> PipelineConfig:
        return PipelineConfig(schedule=self.schedule.value, chunks=CHUNKS)

    @property
    def stage_times(self) -> Times:
        n = CHUNKS / self.config.stages_a_rank
        return Times(*(n * t for t in (self.times.forward, self.times.inputs, self.times.weights)))

    @property
    def table(self) -> Table:
        return table(self.schedule, pp=self.pp, chunks=self.config.stages_a_rank, micro_batches=self.micro_batches)


@dataclass(frozen=True)
class Run:
    """One schedule on one rank."""

    line: Line
    waits: list[tuple[float, float]]  # for messages

    @property
    def unaccounted(self) -> float:
        """Seconds between its first action and its last that it neither computed nor waited: the runner's own."""
        a, b = self.line[0].start, self.line[-1].end
        waited = sum(end - start for start, end in self.waits if a <= start <= b)
        return b - a - sum(span.end - span.start for span in self.line) - waited


class Waiting:
    """Every stage of a rank: waits in place of arithmetic, and what it did when."""

    def __init__(self, times: Times) -> None:
        self.times, self.line = times, []
        self.weight = torch.ones(DIM, requires_grad=True)

    def forward(self, m: int, stage: Stage | None, x: Tensor | None, carry) -> Tensor | tuple[Tensor, dict]:
        assert stage is not None
        s = stage.layers.start
        x = torch.ones(BATCH, SEQ_LEN, DIM, requires_grad=True) if x is None else x

        def timed(kind: Kind, seconds: float, made: Callable[[Tensor, Tensor], Tensor]):
            def run(a: Tensor, b: Tensor) -> Tensor:
                start = time.perf_counter()
                found = made(a, b)
                time.sleep(max(0.0, start + seconds - time.perf_counter()))
                self.line.append(Span(Action(kind, s, m), start, time.perf_counter()))
                return found

            return run

        with deferred.splittable():  # where a schedule does not put them off, the two parts follow each other
            y = deferred.product(
                x, self.weight,
                y=timed(Kind.forward, self.times.forward, torch.mul),
                d_x=timed(Kind.backward_input, self.times.inputs, torch.mul),
                d_w=timed(Kind.backward_weight, self.times.weights, lambda g, x: (g * x).sum((0, 1))),
            )  # fmt: skip
        return y.sum() if stage.last else (y, carry)


@contextmanager
def waits() -> Iterator[list[tuple[float, float]]]:
    """From when to when the runner waited for a message."""
    found, take = [], pipeline.Run._take

    def timed(self, kind: Kind, s: int, m: int) -> list[Tensor]:
        start = time.perf_counter()
        tensors = take(self, kind, s, m)
        found.append((start, time.perf_counter()))
        return tensors

    pipeline.Run._take = timed
    try:
        yield found
    finally:
        pipeline.Run._take = take


def measure(world: World, cases: list[Case], repetitions: int) -> list[list[Run]]:
    """Of this rank: case -> repetition -> what it did."""
    found: list[list[Run]] = [[] for _ in cases]
    for repetition in range(repetitions + 1):
        for case, runs in zip(cases, found, strict=True):
            count = case.pp * case.config.stages_a_rank
            nothing = lambda *args: None  # noqa: E731
            every = [Stage(range(s, s + 1), s == 0, s == count - 1) for s in range(count)]
            mesh = Mesh.build(Layout(pp=case.pp), rank=world.rank, world=world.size, device=world.device)
            pipe = Pipeline(case.config, mesh, every, cfg=ModelConfig(dim=DIM, num_layers=count), dtype=torch.float32)
            stages = Waiting(case.stage_times)
            with waits() as waited:
                dist.barrier()
                pipe.step(case.micro_batches, stages.forward, shape=(BATCH, SEQ_LEN), reshard=nothing, reduce=nothing)
            if repetition:  # the first one connects
                runs.append(Run(stages.line, waited))
    return found


def latency(world: World, times: int = 50) -> float:
    """Median seconds from a send to the end of its receive, half a round trip between two ranks."""
    x, found = torch.zeros(BATCH, SEQ_LEN, DIM), []
    for _ in range(times if world.rank < 2 else 0):
        start = time.perf_counter()
        for turn in (0, 1):
            (dist.send if world.rank == turn else dist.recv)(x, 1 - world.rank)
        found.append((time.perf_counter() - start) / 2)
    dist.barrier()
    return statistics.median(found) if found else 0.0


def trained(world: World, cases: list[Case], repetitions: int) -> list[list[Run]]:
    """The same of a real model's steps; what an action does beside waiting is all computing."""
    trainers = []
    for case in cases:
        cfg = compose([
            "model=tiny", "model.num_layers=4", "model.dim=128", "model.moe.hidden=256", f"layout.pp={case.pp}",
            f"pipeline.schedule={case.schedule.value}", f"train.batch={case.micro_batches}", "train.micro_batch=1",
            "train.seq_len=64", "train.device=cpu", "train.threads=1",
        ])  # fmt: skip
        trainers.append(Trainer(cfg, world, open_data(cfg, log=lambda line: None)))
    found: list[list[Run]] = [[] for _ in cases]
    for repetition in range(repetitions + 1):
        for trainer, runs in zip(trainers, found, strict=True):
            assert trainer.pipeline is not None
            plain, line = trainer.pipeline.step, []
            with waits() as waited:
                trainer.pipeline.step = functools.partial(_observed, plain, line, waited)
                dist.barrier()
                trainer.step()
            trainer.pipeline.step = plain
            if repetition:
                runs.append(Run(line, waited))
    return found


def _observed(step, line: Line, waited: list[tuple[float, float]], *args, **keys) -> Tensor:
    last = time.perf_counter()

    def observe(action: Action) -> None:
        nonlocal last
        now = time.perf_counter()
        if action.kind in WORK:
            line.append(Span(action, max([last, *(end for start, end in waited if start >= last)]), now))
        last = now

    return step(*args, **keys, observe=observe)


def on_ranks(size: int, work: Callable, *args) -> list:
    """Rank -> what ``work(world, *args)`` returned there, on forked ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=get_context("fork")) as pool:
        ranks = [pool.submit(_be_rank, rank, size, folder, os.getpid(), work, args) for rank in range(size)]
        return [rank.result() for rank in ranks]


def _be_rank(rank: int, size: int, folder: str, parent: int, work: Callable, args: tuple):
    die_with(parent)
    if work is waiting_ranks:
        go_first()  # before gloo starts its threads
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    store = FileStore(f"{folder}/store", size)
    world = join(device=Device.cpu, communication=Communication.gloo, timeout=60.0, threads=1, store=store)
    found = work(world, *args)
    leave(world)
    return found


def waiting_ranks(world: World, cases: list[Case], repetitions: int) -> tuple[bool, float, list[list[Run]]]:
    """Of this rank: whether it may go first, a message's seconds, and what ``measure`` finds."""
    return go_first(), latency(world), measure(world, cases, repetitions)


def go_first() -> bool:
    """Wake at once, whoever else computes here; only for ranks that sleep. False where the system does not allow it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except (AttributeError, OSError):
        return False
    return True
