"""Experts that travel, over the steps of a run: who holds which replicas next, and who owns whom from now on.

    end of step s     its global load comes to the host; a thread plans the placements of step s + 2 from the mean load
                      of the last ``window`` steps: planning is never waited for, nor is the device
    begin of step s   every n steps owners change: weights and optimizer state move, in one all-to-all a layer and kind
                      of state; then each layer is given its placement, and nothing is sent until a layer is computed

What is decided from is global and saved, so that a resumed run decides the same: the loads of the last window + 1
steps, and the mean load that owners were chosen by. No rank is in a checkpoint: owners follow from the load.
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moetrain import comm
from moetrain.logical import Chunk, Logical
from moetrain.mesh import Mesh
from moetrain.model.transformer import Stage, Transformer
from moetrain.moe.layer import MoE
from moetrain.moe.placement.cost import modelled
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.travelling import Following, Travelling, check_owners
from moetrain.moe.placement.types import FREE, Costs, Grid, Placement
from moetrain.moe.travel import Replicas, Trip
from moetrain.parallel import measure
from moetrain.parallel.data import Accumulate, ShardingConfig
from moetrain.parallel.plan import Plan

_WEIGHTS = ("gate_up", "down")


class Moves(Protocol):
    """An optimizer whose parameters may come to lie elsewhere."""

    def state(self) -> dict[str, dict[str, Tensor]]: ...

    def replace(self, name: str, storage: Tensor) -> None: ...

    def moved(self) -> None: ...


_MEASURED = 2, 3, 4
"""The steps of a life that costs are measured in: the first one warms up."""


@dataclass(frozen=True)
class Planned:
    """Placements of this rank's layers for one step, this rank's part in them, and what it took."""

    placements: list[Placement]
    trips: list[Trip]
    seconds: float


@dataclass
class Calibrations:
    """Of the steps since they were last asked for: how often the host waited, for how long, how often it paid."""

    syncs: int = 0
    seconds: float = 0.0
    accepted: int = 0

    def add(self, seconds: float, accepted: bool) -> None:
        self.syncs, self.seconds, self.accepted = self.syncs + 1, self.seconds + seconds, self.accepted + accepted


class Mover:
    """One rank's. Every rank of a pipeline stage holds one and calls it alike; collective."""

    def __init__(
        self, model: Transformer, mesh: Mesh, plan: Plan, *, policy: Travelling, grid: Grid,
        sharding: ShardingConfig, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """``model``: its experts are those that ``policy`` gives this rank while no load is known."""
        self.model, self.plan, self.policy, self.grid = model, plan, policy, grid
        self.costs: Costs | None = None  # until they are measured nobody travels
        self._known_from = 0  # the first step that is planned by them
        self.window = policy.window if isinstance(policy, Following) else 1
        self.wire = policy.wire.torch if policy.wire else None
        self.sharding, self.dtype, self.staged = sharding, dtype, mesh.layout.pp > 1
        self.layers = model.moe_layers()
        self._expert = 3 * model.cfg.dim * -(-model.cfg.moe.hidden // mesh.layout.etp)  # numbers of one, on one rank
        self.rank, self.group = mesh.index("moe", "edp", "ep"), mesh.group("moe", "edp", "ep", use="experts")
        every = model.cfg.moe_configs
        most = max(moe.num_choices for moe in every)
        self.at = [model.cfg.moe_layers.index(layer.layer) for layer in self.layers]
        self.sizes = [layer.cfg.num_experts for layer in self.layers]
        pin = mesh.device.type == "cuda"
        self.loads_WLE = torch.zeros(self.window + 1, len(every), most, dtype=torch.int64, pin_memory=pin)
        self.settled_LE = torch.zeros(len(every), most, dtype=torch.int64)
        self.owners = [layer.placement.owner_E for layer in self.layers]
        self.moved = 0  # experts that changed owners since the start of this life
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="placement")
        self._planned: dict[int, Future[Planned]] = {}
        self._last: dict[int, tuple[Placement, Trip]] = {}  # of each layer; the thread's alone
        self._copied: torch.cuda.Event | None = None
        self.now: Planned | None = None
        self.calibrations = Calibrations()
        if isinstance(policy, FSSDP) and policy.calibrate:
            for layer in self.layers:
                layer.calibrate = partial(self._calibrate, layer)
        self.news: list[str] = []  # lines for the log
        self._layout, self._etp = str(mesh.layout), mesh.layout.etp
        self._pinned = policy.costs.values if isinstance(policy, Following) else {}
        self._watch: measure.Stopwatch | None = None
        self._steps = 0  # of this life
        self._stage = mesh.group("moe", "edp", "ep", "etp")
        self._every = mesh.group("moe", "pp", "edp", "ep", "etp")
        if all(value is not None for name, value in self._pinned.items() if name != "shared"):
            self._know(FREE)
        self._plan(0)
        self._install(self._planned[0].result())

    def begin_step(self, step: int, optimizer: Moves) -> None:
        n = self.policy.reshard_every if isinstance(self.policy, FSSDP) else 0
        if n and step and step % n == 0:
            self._wait()
            self.settled_LE = sum(self._window(step - 1), torch.zeros_like(self.settled_LE))
            self._settle(optimizer)
            self._planned.clear()
        for ahead in (step, step + 1):
            if ahead not in self._planned:  # the first steps, and where owners have changed
                self._plan(ahead)
        self._install(self._planned.pop(step).result())
        self._steps += 1
        if self.costs is None and self._steps == _MEASURED[0]:
            self._watch = measure.Stopwatch(self.model)

    def again(self) -> None:
        """Before the same step's forwards are run once more."""
        assert self.now is not None
        self._install(self.now)

    def end_step(self, load_LE: Tensor, step: int) -> None:
        """(L, E) int64: the step's global load of every MoE layer of the model."""
        self.loads_WLE[step % len(self.loads_WLE)].copy_(load_LE, non_blocking=True)
        if load_LE.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        if self._watch is not None:
            self._watch.end_step()
            if self._steps == _MEASURED[-1]:
                self._measure(self._watch, step)
                self._watch = None
        self._plan(step + 2)

    def _measure(self, watch: measure.Stopwatch, step: int) -> None:
        watch.stop()
        gathers, reduces = self._trips()
        found = measure.costs(
            watch, dim=self.model.cfg.dim, expert=self._expert, dtype=self.dtype, group=self.group, every=self._every,
            gathers=gathers, reduces=reduces,
        )  # fmt: skip
        self._know(found)
        self._known_from = step + 2
        words = " ".join(
            f"model.moe.placement.costs.{name}={value:g}" for name, value in vars(self.costs or found).items()
        )
        self.news.append(f"placements are planned by what was measured, to be pinned for the same bits again: {words}")

    def _know(self, costs: Costs) -> None:
        self.costs = Costs(**vars(costs) | {k: v for k, v in self._pinned.items() if v is not None})

    @property
    def planning_seconds(self) -> float:
        """What it took to plan the step's placements, beside an earlier step."""
        return self.now.seconds if self.now else 0.0

    def finish(self) -> None:
        """After a step's last backward: all gradients are where their experts are owned."""
        for replicas in self._replicas():
            if replicas.waits:  # of earlier micro-batches, where the last had a placement of its own
                replicas.reduce()
            replicas.finish()
            replicas.free()

    def free(self) -> None:
        """After forwards that no backward follows."""
        for replicas in self._replicas():
            replicas.free()

    def begin_micro_batch(self, last: bool) -> None:
        """Of a rank without a pipeline."""
        for replicas in self._replicas():
            replicas.last = last
            replicas.reduces = last or self.sharding.accumulate is Accumulate.sharded

    def reshard(self, stage: Stage) -> None:
        """A backward of a stage of a pipeline has ended."""
        for replicas in self._replicas(stage):
            if not replicas.keep:
                replicas.free()

    def reduce(self, stage: Stage, last: bool) -> None:
        """A micro-batch's gradients of a stage are whole; ``last``: of the step."""
        for replicas in self._replicas(stage):
            replicas.last, replicas.reduces = last, last or self.sharding.accumulate is Accumulate.sharded
            if replicas.waits or last:
                replicas.end_backward()

    def tensors(self) -> dict[str, Logical]:
        """What is saved, alike on all ranks."""
        self._wait()
        found = {"placement.loads": self.loads_WLE, "placement.settled": self.settled_LE}
        return {name: Logical(tuple(x.shape), x.dtype, (Chunk((0,) * x.dim(), x),)) for name, x in found.items()}

    def measured(self) -> dict[str, Any]:
        """The costs that placements are planned by, and the layout that they hold for."""
        costs = None if self.costs is None else vars(self.costs)
        return {"layout": self._layout, "costs": costs, "from": self._known_from}

    def restore(self, step: int, optimizer: Moves, *, measured: dict[str, Any] | None = None) -> None:
        """After ``tensors`` were loaded in place, before ``step``: owners are those that they imply.

        ``measured``: by the run that saved them; costs of the same layout are not measured again.
        """
        if self.costs is None and measured and measured["layout"] == self._layout and measured["costs"]:
            self._know(Costs(**measured["costs"]))
            self._known_from = measured["from"]
        self._settle(optimizer)
        self._planned.clear()
        self._plan(step)
        self._install(self._planned[step].result())

    def _owners(self) -> list[Tensor]:
        loads = [self.settled_LE[i, :E].double() for i, E in zip(self.at, self.sizes, strict=True)]
        owners = self.policy.owners(loads, self.grid)
        check_owners(owners, self.sizes, self.grid.ranks)
        return owners

    def _settle(self, optimizer: Moves) -> None:
        owners = self._owners()
        moved = [int((new != old).sum()) for new, old in zip(owners, self.owners, strict=True)]
        for layer, old_E, new_E, some in zip(self.layers, self.owners, owners, moved, strict=True):
            if some:
                self._hand_over(layer, old_E, new_E, optimizer)
        self.owners = owners
        if any(moved):
            self.moved += sum(moved)
            optimizer.moved()

    @torch.no_grad()
    def _hand_over(self, layer: MoE, old_E: Tensor, new_E: Tensor, optimizer: Moves) -> None:
        """Bring each expert's weights and optimizer state to its new owner, bit for bit."""
        experts, ranks = layer.experts, range(self.grid.ranks)
        mine, next_ = ((owner_E == self.rank).nonzero().flatten() for owner_E in (old_E, new_E))
        out = [(new_E[mine] == r).nonzero().flatten() for r in ranks]
        into = [(old_E[next_] == r).nonzero().flatten() for r in ranks]
        send, recv = ([len(x) for x in some] for some in (out, into))
        out_N, into_N = torch.cat(out), torch.cat(into)

        def travelled(tensors: list[Tensor]) -> list[Tensor]:
            rows = torch.cat([x[out_N.to(x.device)].flatten(1) for x in tensors], 1)
            came = comm.all_to_all(rows, recv=recv, send=send, group=self.group)
            found = torch.empty_like(came)
            found[into_N.to(found.device)] = came
            parts = found.split([math.prod(x.shape[1:]) for x in tensors], 1)
            return [part.view(-1, *x.shape[1:]).contiguous() for part, x in zip(parts, tensors, strict=True)]

        names = [f"blocks.{layer.layer}.moe.experts.{weight}" for weight in _WEIGHTS]
        for weight, moved in zip(_WEIGHTS, travelled([getattr(experts, w).detach() for w in _WEIGHTS]), strict=True):
            new = nn.Parameter(moved)
            new.grad_dtype = getattr(experts, weight).grad_dtype
            setattr(experts, weight, new)
        for states in optimizer.state().values():
            if names[0] in states:
                states.update(zip(names, travelled([states[name] for name in names]), strict=True))
        for name, weight in zip(names, _WEIGHTS, strict=True):
            self.plan[name] = replace(self.plan[name], ids=tuple(next_.tolist()))
            optimizer.replace(name, getattr(experts, weight).detach())

    def _plan(self, step: int) -> None:
        """Begin to plan the placements of ``step``, from the loads up to two steps before it."""
        owners, copied, known = self.owners, self._copied, self.costs if step >= self._known_from else None

        def planned() -> Planned:
            if copied is not None:
                copied.synchronize()
            since = time.perf_counter()
            window_LE = self._mean(step - 2) if known else self.settled_LE * 0.0
            for n, (i, E, owner_E) in enumerate(zip(self.at, self.sizes, owners, strict=True)):
                placement = self.place(window_LE[i, :E], owner_E, known or FREE)
                if (before := self._last.get(n)) is None or not before[0].same(placement):
                    placement.target_EJ(self.rank, torch.device("cpu"), etp=self._etp)  # made here, found later
                    self._last[n] = placement, Trip.of(placement, self.rank)
            placements, trips = map(list, zip(*self._last.values(), strict=True)) if self._last else ([], [])
            return Planned(placements, trips, time.perf_counter() - since)

        self._planned[step] = self._threads.submit(planned)

    def place(self, load_E: Tensor, owner_E: Tensor, costs: Costs) -> Placement:
        """What the policy says. A dry run replaces this."""
        return self.policy(load_E, owner_E, self.grid, costs)

    def _window(self, last: int) -> list[Tensor]:
        """(L, E) int64 each: the loads of the ``window`` steps up to ``last``, of those that are known."""
        loads = [self.loads_WLE[s % (self.window + 1)] for s in range(last - self.window + 1, last + 1)]
        return [load_LE for load_LE in loads if load_LE.any()]

    def _mean(self, last: int) -> Tensor:
        loads = self._window(last)
        return sum(loads, torch.zeros_like(self.settled_LE)).double() / max(1, len(loads))

    def _install(self, planned: Planned) -> None:
        self.now, before = planned, dict[Stage, Replicas]()
        for layer, placement, trip in zip(self.layers, planned.placements, planned.trips, strict=True):
            experts, now = layer.experts, layer.experts.replicas
            experts.calibrated = ()
            stage = next(stage for stage in self.model.stages if layer.layer in stage.layers)
            layer.placement = placement
            owned = (experts.gate_up, experts.down)
            if not trip.travels and trip.owned:
                experts.replicas = None
            elif now is None or now.trip != trip or now.owned[0] is not owned[0]:
                experts.replicas = self._made(layer, trip)
            if experts.replicas is not None:
                experts.replicas.sent = 0
                experts.replicas.before = before.get(stage)
                before[stage] = experts.replicas

    def _made(self, layer: MoE, trip: Trip) -> Replicas:
        return Replicas(
            (layer.experts.gate_up, layer.experts.down), trip, group=self.group, dtype=self.dtype, wire=self.wire,
            staged=self.staged, keep=self.sharding.experts == 2,
        )  # fmt: skip

    def _calibrate(self, layer: MoE, load_E: Tensor) -> tuple[Placement, Replicas] | None:
        """(E,) assignments of a micro-batch on this rank: a placement of its own where that costs less time than the
        planned one, for which experts have travelled already. Collective; waits for the device."""
        since, costs = time.perf_counter(), self.costs
        if costs is None:
            return None
        total_E = comm.all_reduce_(load_E.clone(), group=self._stage).cpu().double()
        trips = 2 if self.sharding.experts == 2 else 3
        again = replace(costs, expert=costs.expert * trips / sum(self._trips()), hidden=0.0)
        placement = self.policy(total_E, layer.placement.owner_E, self.grid, again)
        before = modelled(layer.placement, total_E, replace(again, expert=0.0)).time_us
        accepted = modelled(placement, total_E, again).time_us < before
        self.calibrations.add(time.perf_counter() - since, accepted)
        if not accepted:
            return None
        replicas = self._made(layer, Trip.of(placement, self.rank))
        replicas.last = replicas.reduces = True
        layer.experts.calibrated += (replicas,)
        return placement, replicas

    def _trips(self) -> tuple[int, int]:
        """How often an expert sets out in a step, and how often its gradient."""
        m = len(self.layers[0].load_ME) if self.layers else 1
        gathers = 1 if self.sharding.experts == 2 else 2 * m
        return gathers, 1 if self.sharding.accumulate is Accumulate.local else m

    def _replicas(self, stage: Stage | None = None) -> list[Replicas]:
        layers = [x for x in self.layers if stage is None or x.layer in stage.layers]
        return [r for x in layers for r in (x.experts.replicas, *x.experts.calibrated) if r is not None]

    def _wait(self) -> None:
        """Until every load is on the host."""
        if self._copied is not None:
            self._copied.synchronize()
