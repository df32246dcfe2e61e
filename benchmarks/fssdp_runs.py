"""Trainers of every placement policy that take turns on the same ranks. Read ``measure`` first."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from fssdp_loads import EXPERTS, LAYERS, Imposed
from torch import nn

from moetrain import config as configs
from moetrain import kernels
from moetrain.cli.compose import compose
from moetrain.job import open_data
from moetrain.mesh import Mesh
from moetrain.moe.placement.travelling import Following
from moetrain.moe.rows import inverse
from moetrain.moe.types import Rows
from moetrain.train import Trainer
from moetrain.world import World

POLICIES = ["static", "shadow", "replicate_all", "fssdp"]
EVEN = "even"  # static placement where every expert has as many: nobody waits, and only tokens travel
WARM = 8  # steps that are not counted: costs are known after the fourth, the window is full in the seventh
STOLEN, TRIES = 0.02, 3
RESHARD = 100
"""Owners follow the load every so many steps, as is the default."""


@dataclass(frozen=True)
class Size:
    batch: int = 8  # samples of a step, over all ranks
    seq_len: int = 256
    also: tuple[str, ...] = ("sharding.dense=2", "sharding.experts=2")  # as in the quickstart


@dataclass
class Seen:
    """Of one policy on one rank; lists have an item for every counted step, of items for every MoE layer."""

    seconds: list[float] = field(default_factory=list)  # the plan for a later step included
    rows: list[list[int]] = field(default_factory=list)  # assignments that it computes
    replicas: list[list[int]] = field(default_factory=list)  # experts of others that it holds
    copies: list[list[int]] = field(default_factory=list)  # of experts that it sends, or receives if those are more
    planning: list[float] = field(default_factory=list)  # seconds
    costs: dict[str, float] | None = None
    expert_bytes: int = 0
    travels: int = 0  # times that a replica does in a step, there or, as its gradient, back

    def keep(self, steps: list[int]) -> None:
        for name in ("seconds", "rows", "replicas", "copies", "planning"):
            if found := getattr(self, name):
                setattr(self, name, [found[i] for i in steps])


@dataclass
class Measured:
    """On one rank."""

    seen: dict[str, Seen]
    row_seconds: float  # of a processor, for one row of one layer
    blocks: int  # that were run
    stolen: list[float]  # of the processors' time in each block that is kept: what other machines of the host took


class Turns:
    """One policy's trainer, and what is noted of its steps."""

    def __init__(self, name: str, case: str, world: World, *, size: Size, steps: int, like: Mesh | None) -> None:
        self.name, self.seen, self._rows = name, Seen(), []
        self.first = RESHARD - WARM + 1 if case == "dealt" else 0
        cfg = compose([
            "model=tiny", f"model.moe.num_experts={EXPERTS}", f"model.num_layers={LAYERS}", "balance=[]",
            f"layout.ep={world.size}", f"placement={'static' if name == EVEN else name}", f"train.batch={size.batch}",
            f"train.micro_batch={size.batch // world.size}", f"train.seq_len={size.seq_len}", "optim.warmup=0",
            "train.device=cpu", "train.threads=1", *size.also,
        ])  # fmt: skip
        imposed = Imposed(case=EVEN if name == EVEN else case, ranks=world.size, steps=steps)
        moe = configs.replace(cfg.model.moe, router=imposed)
        cfg = configs.replace(cfg, model=configs.replace(cfg.model, moe=moe))
        self.run = Trainer(cfg, world, open_data(cfg, log=lambda line: None), like=like)
        for layer in self.run.model.moe_layers():
            layer.experts.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Rows, object]) -> None:
        self._rows.append(int(args[0].offsets_S[-1]))

    def warm_up(self) -> None:
        """Two steps; of policies that follow the load so many that they do."""
        steps = WARM if isinstance(self.run.cfg.model.moe.placement, Following) else 2
        self.run.steps = self.first + WARM - steps
        self.run.consumed = self.run.steps * self.run.cfg.train.batch
        for _ in range(steps):
            self.step(counts=False)

    def step(self, *, counts: bool = True) -> None:
        """And the plan for a later one, which a run makes beside its next step, on the same core."""
        self._rows = []
        dist.barrier()
        start = time.perf_counter()
        self.run.step()
        for future in self.run.mover._planned.values() if self.run.mover else ():
            future.result()
        if counts:
            self.seen.seconds.append(time.perf_counter() - start)
            self._note()

    def _note(self) -> None:
        seen, mover = self.seen, self.run.mover
        seen.rows.append(self._rows)
        if mover is None or mover.now is None:
            return
        trips = mover.now.trips
        seen.replicas.append([trip.slots - trip.owned for trip in trips])
        seen.copies.append([max(sum(trip.send), sum(trip.recv)) for trip in trips])
        seen.planning.append(mover.now.seconds)
        seen.costs = None if mover.costs is None else dict(vars(mover.costs))
        seen.expert_bytes = mover._expert * mover.dtype.itemsize
        seen.travels = 2 if self.run.cfg.sharding.experts == 2 else 3


def measure(world: World, case: str, pairs: int, size: Size) -> Measured:
    """Blocks of a step of every policy in an order that rotates, then one of even loads.

    A block in which the host gave ``STOLEN`` of the processors' time to others is run again, until there are ``pairs``
    quiet ones or three times as many in all, of which the quietest are kept.
    """
    turns: list[Turns] = []
    for name in [*POLICIES, *[EVEN] * (case != EVEN)]:
        like = turns[0].run.mesh if turns else None
        turns.append(Turns(name, case, world, size=size, steps=WARM + pairs, like=like))
    for turn in turns:
        turn.warm_up()
    stolen: list[float] = []
    while len(stolen) < TRIES * pairs and sum(part < STOLEN for part in stolen) < pairs:
        first, before = len(stolen) % len(POLICIES), ticks()
        for turn in turns[first : len(POLICIES)] + turns[:first] + turns[len(POLICIES) :]:
            turn.step()
        taken, total = (now - then for now, then in zip(ticks(), before, strict=True))
        part = torch.tensor(taken / total, dtype=torch.float64)
        dist.broadcast(part, 0)
        stolen.append(part.item())
    kept = sorted(sorted(range(len(stolen)), key=stolen.__getitem__)[:pairs])
    for turn in turns:
        turn.seen.keep(kept)
    seen = {turn.name: turn.seen for turn in turns}
    return Measured(seen, row_seconds(turns[0].run), len(stolen), [stolen[i] for i in kept])


def ticks() -> tuple[int, int]:
    """Of all processors since the machine started: those that its host gave to others, and all."""
    every = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return every[7], sum(every)


def row_seconds(run: Trainer, times: int = 5) -> float:
    """Of the processor, for one row's forward and backward, where all of a rank's experts have as many."""
    layer, t = run.model.moe_layers()[0], run.cfg.train
    experts, slots = layer.experts, len(layer.owned)
    each = t.micro_batch * t.seq_len * layer.cfg.router.top_k // slots
    backend, _ = kernels.choose(
        layer.cfg.kernel, device=torch.device("cpu"), dtype=torch.float32, dim=layer.dim, hidden=layer.width
    )
    index_M = torch.arange(each * slots)
    offsets_S = torch.arange(1, slots + 1, dtype=torch.int32) * each
    found = []
    for _ in range(times):
        x_ND, weights_M = torch.randn(each * slots, layer.dim), torch.rand(each * slots)
        rows = Rows(x_ND.requires_grad_(), index_M, inverse(index_M)[:, None], offsets_S, weights_M.requires_grad_())
        dist.barrier()
        since = time.thread_time()
        y_ND = backend(rows, experts.gate_up, experts.down)
        y_ND.backward(x_ND.detach())
        found.append(time.thread_time() - since)
        experts.gate_up.grad = experts.down.grad = None
    return sorted(found)[times // 2] / (each * slots)
