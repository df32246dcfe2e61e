"""Pipeline parallelism: which layers a stage has, and how a rank runs its part of a schedule.

The order of a schedule is torch's (``schedules.py``). Running it is not: torch's runtime keeps a receive buffer for
every micro-batch of the step, splits backwards by running parts of the graph twice, collectives included, and takes
tensors only. Here a buffer lives from its arrival to its use, weight gradients are put off as products
(``deferred.py``), and a micro-batch's Context goes to every stage.
"""

import contextlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import deferred, where
from moetrain.config import UserError
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.model.flops import layer_flops
from moetrain.model.transformer import ModelConfig, Stage
from moetrain.moe.types import Carry
from moetrain.parallel import schedules
from moetrain.parallel.plan import Plan
from moetrain.parallel.schedules import BACKWARDS, RECEIVED_AS, STEP, Action, Kind, PipelineConfig


def stages(cfg: ModelConfig, layout: Layout, pipeline: PipelineConfig) -> list[Stage]:
    """Every stage of the pipeline, in order; raises ``UserError`` where the layers cannot be dealt so."""
    count = layout.pp * pipeline.stages_a_rank if layout.pp > 1 else 1
    if count > cfg.num_layers:
        each = f" with {pipeline.stages_a_rank} stages a rank" if pipeline.stages_a_rank > 1 else ""
        raise UserError(
            f"layout.pp={layout.pp}{each} (pipeline.schedule={pipeline.schedule}) makes {count} stages of "
            f"model.num_layers={cfg.num_layers} layers: each takes at least one, lower layout.pp"
            + (" or pipeline.chunks" if pipeline.order.is_dealt else "")
        )
    sizes = pipeline.stages if layout.pp > 1 else None
    if sizes is not None and (len(sizes), sum(sizes)) != (count, cfg.num_layers):
        raise UserError(
            f"pipeline.stages={sizes} is {len(sizes)} stages of {sum(sizes)} layers, layout.pp={layout.pp} under "
            f"pipeline.schedule={pipeline.schedule} needs {count} of model.num_layers={cfg.num_layers}: for "
            f"example {even(cfg, count)}"
        )
    ends = list(itertools.accumulate(sizes or even(cfg, count)))
    return [Stage(range(a, b), a == 0, b == ends[-1]) for a, b in zip([0, *ends], ends, strict=False)]


def even(cfg: ModelConfig, count: int) -> list[int]:
    """Layers of each of ``count`` stages such that the most costly stage costs least, then the squares of all."""
    costs = layer_flops(cfg)
    first, last = costs.pop("embedding"), costs.pop("head")
    sums = [0.0, *itertools.accumulate(costs[i] for i in range(cfg.num_layers))]
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}  # layers dealt -> the best way so far
    for stage in range(count):
        ends: dict[int, tuple[float, float, list[int]]] = {}
        for start, (most, squares, sizes) in best.items():
            stop = cfg.num_layers - (count - stage - 1)
            for end in range(start + 1, stop + 1) if stage < count - 1 else [cfg.num_layers]:
                cost = sums[end] - sums[start] + first * (stage == 0) + last * (stage == count - 1)
                tried = (max(most, cost), squares + cost**2, [*sizes, end - start])
                if end not in ends or tried < ends[end]:
                    ends[end] = tried
        best = ends
    return best[cfg.num_layers][2]


def tie(held: Plan, mesh: Mesh) -> None:
    """The first and the last stage each have the embedding: their gradients are summed, and the norm counts one."""
    pair = mesh.ends("dense", "pp")
    if "embedding.weight" in held:
        held["embedding.weight"] = replace(held["embedding.weight"], group=pair, over="both ends of pp")


def check_enough(layout: Layout, pipeline: PipelineConfig, *, micro_batches: int) -> None:
    """Raise ``UserError`` for a step too small for its schedule."""
    if layout.pp > 1 and (why := schedules.too_few(pipeline, pp=layout.pp, micro_batches=micro_batches)):
        raise UserError(f"{why}: raise train.batch, lower layout.dp or train.micro_batch, or choose another schedule")


Forward = Callable[[int, Stage | None, Tensor | None, Carry], Tensor | tuple[Tensor, Carry]]
"""(micro-batch, stage, what the stage before passed) -> what the next needs, or the last stage's loss."""


@dataclass
class InFlight:
    """A micro-batch between a stage's forward and backward."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[torch.autograd.graph.GradientEdge] = field(default_factory=list)


class Pipeline:
    """This rank's part of a pipeline, of which ``every`` is all stages."""

    def __init__(
        self, pipeline: PipelineConfig, mesh: Mesh, every: list[Stage], *, cfg: ModelConfig, dtype: torch.dtype
    ) -> None:
        self.cfg, self.pp, self.stages, self.model = pipeline, mesh.layout.pp, every, cfg
        self.rank, self.device, self.dtype = mesh.index("dense", "pp"), mesh.device, dtype
        group = mesh.group("dense", "pp")
        assert group is not None, "a pipeline has two ranks at the least"
        self.group: ProcessGroup = group
        self.peers = dist.get_process_group_ranks(group)

    def carried(self, s: int) -> dict[str, int]:
        """Name -> width of what the gates up to stage s have to pass on."""
        made = any(i < self.stages[s].layers.stop for i in self.model.moe_layers)
        return self.model.moe.gate.carries if made else {}

    def step(
        self,
        micro_batches: int,
        forward: Forward,
        *,
        shape: tuple[int, int],
        reshard: Callable[[Stage], None],
        reduce: Callable[[Stage, bool], None],
        around_backward: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        observe: Callable[[Action], None] | None = None,
    ) -> Tensor:
        """One schedule: the sum of the last stage's losses, zero on ranks without it; gradients accumulated.

        ``shape``: (B, S) of what stages pass. ``reshard(stage)`` is called after each of a stage's backwards,
        ``reduce(stage, last)`` when it is whole, weight gradients included; each part of one runs inside
        ``around_backward()``.
        """
        order, released = self.order(micro_batches)
        run = Run(self, forward, shape, reshard, reduce, released, micro_batches)
        with deferred.splittable(self.cfg.order.splits_backward):
            for action in order:
                with around_backward() if action.kind in BACKWARDS else contextlib.nullcontext():
                    run.do(action)
                if observe is not None:
                    observe(action)
        return run.finish()

    @torch.no_grad()
    def forwards(self, micro_batches: int, forward: Forward, *, shape: tuple[int, int]) -> Tensor:
        """Losses without backward, as ``step`` returns them: every micro-batch through a stage, then the next stage."""
        order, released = self.order(micro_batches, backward=False)
        nothing = lambda *args: None  # noqa: E731
        run = Run(self, forward, shape, nothing, nothing, released, micro_batches)
        for action in order:
            run.do(action)
        return run.finish()

    def order(self, micro_batches: int, *, backward: bool = True):
        """This rank's actions, and which of its sends a receive proves to have arrived."""
        known = {"pp": self.pp, "chunks": self.cfg.stages_a_rank, "micro_batches": micro_batches, "backward": backward}
        orders = schedules.table(self.cfg.order, **known)
        return orders[self.rank], schedules.delivered(self.rank, self.cfg.order, **known)


class Run:
    """What one schedule has in flight."""

    def __init__(
        self, pipe: Pipeline, forward: Forward, shape, reshard, reduce, delivered, micro_batches: int
    ) -> None:  # fmt: skip
        self.pipe, self.forward, self.shape, self.reshard, self.reduce = pipe, forward, shape, reshard, reduce
        self.delivered = delivered
        self.losses: list[Tensor] = []
        self.arriving: dict[tuple[Kind, int, int], tuple[list[Tensor], list[dist.Work]]] = {}
        self.passed: dict[tuple[Kind, int, int], list[Tensor]] = {}  # for a stage of this rank, or yet to be sent
        self.flying: dict[tuple[int, int], InFlight] = {}
        self.queues: dict[tuple[int, int], deferred.Queue] = {}
        self.sent: dict[Action, list[tuple[dist.Work, Tensor]]] = {}
        self.left = {s: micro_batches for s in pipe.cfg.stages_of(pipe.rank, pp=pipe.pp)}
        self.micro_batches = micro_batches

    def do(self, action: Action) -> None:
        kind, s, m = action
        if kind in (Kind.send_forward, Kind.send_backward):
            self._send(kind, s, m)
        elif kind in (Kind.receive_forward, Kind.receive_backward):
            self._receive(kind, s, m)
        else:
            self.compute(action)

    def compute(self, action: Action) -> None:
        kind, s, m = action
        if kind is Kind.forward:
            self._forward(s, m)
        elif kind is Kind.backward:
            self._backward(s, m)
            self._whole(s)
        elif kind is Kind.backward_input:
            with deferred.into(self.queues.setdefault((s, m), [])):
                self._backward(s, m)
        else:
            deferred.run(self.queues.pop((s, m)))
            self._whole(s)

    def finish(self) -> Tensor:
        for action in list(self.sent):
            self._delivered(action)
        zero = torch.zeros((), device=self.pipe.device, dtype=torch.promote_types(self.pipe.dtype, torch.float32))
        return sum(self.losses, zero)

    def _whole(self, s: int) -> None:
        self.left[s] -= 1
        self.reduce(self.pipe.stages[s], self.left[s] == 0)

    def _forward(self, s: int, m: int) -> None:
        stage = self.pipe.stages[s]
        flying = InFlight()
        if not stage.first:
            flying.inputs = self._take(Kind.receive_forward, s, m)
            if torch.is_grad_enabled():
                flying.inputs = [x.detach().requires_grad_() for x in flying.inputs]
        x, *carry = flying.inputs or [None]
        names = [] if stage.first else self.pipe.carried(s - 1)
        found = self.forward(m, stage, x, dict(zip(names, carry, strict=True)))  # pyright: ignore[reportArgumentType]
        if isinstance(found, Tensor):
            outputs = [found]
            self.losses.append(found.detach())
        else:
            outputs = [found[0], *(found[1][name] for name in self.pipe.carried(s))]
            self._put(Kind.send_forward, s, m, [y.detach() for y in outputs])
        if torch.is_grad_enabled():
            flying.outputs = [torch.autograd.graph.get_gradient_edge(y) for y in outputs]
            self.flying[s, m] = flying

    def _backward(self, s: int, m: int) -> None:
        where.at("backward", micro_batch=m)
        flying = self.flying.pop((s, m))
        last = self.pipe.stages[s].last
        grads = [torch.ones_like(self.losses[0])] if last else self._take(Kind.receive_backward, s, m)
        torch.autograd.backward(flying.outputs, grads)
        self.reshard(self.pipe.stages[s])
        if not self.pipe.stages[s].first:
            found = [torch.zeros_like(x) if x.grad is None else x.grad for x in flying.inputs]
            self._put(Kind.send_backward, s, m, found)

    def _put(self, kind: Kind, s: int, m: int, tensors: list[Tensor]) -> None:
        """What stage s has made for its neighbour: of this rank, or for ``_send``."""
        receive, other = RECEIVED_AS[kind], s + STEP[kind]
        self.passed[(receive, other, m) if other in self.left else (kind, s, m)] = tensors

    def _take(self, kind: Kind, s: int, m: int) -> list[Tensor]:
        """What another stage has made for stage s."""
        if (kind, s, m) not in self.arriving:
            return self.passed.pop((kind, s, m))
        tensors, works = self.arriving.pop((kind, s, m))
        with where.inside(f"receive from stage {s - 1 if kind is Kind.receive_forward else s + 1}"):
            for work in works:
                work.wait()
        for send in self.delivered.get(Action(kind, s, m), ()):
            self._delivered(send)
        return tensors

    def _delivered(self, send: Action) -> None:
        with where.inside(f"send from stage {send.stage}"):
            for work, _ in self.sent.pop(send):
                work.wait()

    def _send(self, kind: Kind, s: int, m: int) -> None:
        other = s + STEP[kind]
        for i, x in enumerate(self.passed.pop((kind, s, m))):
            x = x.contiguous()
            work = dist.isend(
                x, self._peer(other), group=self.pipe.group, tag=self._tag(RECEIVED_AS[kind], other, m, i)
            )
            assert work is not None
            self.sent.setdefault(Action(kind, s, m), []).append((work, x))

    def _receive(self, kind: Kind, s: int, m: int) -> None:
        sender = s - 1 if kind is Kind.receive_forward else s + 1
        tensors, works = [], []
        B, S = self.shape
        carried = self.pipe.carried(s - 1 if kind is Kind.receive_forward else s)
        for i, shape in enumerate([(B, S, self.pipe.model.dim), *((B * S, width) for width in carried.values())]):
            x = torch.empty(shape, dtype=self.pipe.dtype, device=self.pipe.device)
            work = dist.irecv(x, self._peer(sender), group=self.pipe.group, tag=self._tag(kind, s, m, i))
            assert work is not None
            tensors.append(x)
            works.append(work)
        self.arriving[kind, s, m] = tensors, works

    def _peer(self, s: int) -> int:
        return self.pipe.peers[self.pipe.cfg.rank_of(s, pp=self.pipe.pp)]

    def _tag(self, kind: Kind, s: int, m: int, i: int) -> int:
        """One number a message; NCCL knows no tags and keeps the order, which is the same at both ends."""
        at = ((kind is Kind.receive_backward) * len(self.pipe.stages) + s) * self.micro_batches + m
        return at * (1 + len(self.pipe.model.moe.gate.carries)) + i
