"""A pipeline's micro-batches that do what others did: in the ledger, without being run again.

An action of a schedule makes and drops the same storages as an earlier one that met the same state. So of each stage
those micro-batches are run that come into a state first; the others write into the ledger what those did. What outlives
an action is there for each: what goes from stage to stage follows the schedule, and FSDP drops what its last
reduce-scatter read at its next one, whosesoever it was. So these are made, of the same size, and dropped in their turn.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.utils._pytree import tree_leaves, tree_map

from moetrain.memory.ledger import Change, Ledger
from moetrain.memory.ledger import Kind as Holds
from moetrain.model.transformer import Transformer
from moetrain.moe.travel import Replicas
from moetrain.parallel.data import param_groups
from moetrain.parallel.pipeline import InFlight, Pipeline, Run
from moetrain.parallel.schedules import BACKWARDS, Action, Kind

State = tuple[Kind, int, tuple[int, ...], tuple[bool, ...]]
_WHOLE = (Kind.backward, Kind.backward_weight)
_BUFFERS = ("reduce_scatter_state", "reduce_scatter_states")
"""Where FSDP2 keeps what its last reduce-scatters read, by torch's version."""


def states(order: Sequence[Action], micro_batches: int, *, last: int) -> dict[Action, State]:
    """What decides which storages an action makes and drops: its kind and stage; whether micro-batches of the stage had
    a forward, a backward, all of their gradients before: none, some, all but this one; whether one had a backward since
    the stage's gradients were last reduced; whether any stage's have been; whether the stage, any, the ``last`` of all
    had a forward since the stage's last backward, any's, any's: at whose end FSDP drops what root and head still hold.
    """
    found: dict[Action, State] = {}
    forwards, backwards, wholes = ({action.stage: 0 for action in order} for _ in range(3))
    fresh: set[int] = set()  # stages with a backward and no reduction since
    here: set[int] = set()  # stages with a forward and no backward since
    anywhere: set[int] = set()  # with none of any stage
    for action in order:
        kind, s, _ = action
        if kind is not Kind.forward and kind not in BACKWARDS:
            continue
        had = tuple((n[s] > 0) + (n[s] == micro_batches - 1) for n in (forwards, backwards, wholes))
        flags = s in fresh, any(wholes.values()), s in here, bool(anywhere), last in anywhere
        found[action] = kind, s, had, flags
        forwards[s] += kind is Kind.forward
        backwards[s] += kind in (Kind.backward, Kind.backward_input)
        wholes[s] += kind in _WHOLE
        if kind is Kind.forward:
            here.add(s)
            anywhere.add(s)
        elif kind is not Kind.backward_weight:
            here.discard(s)
            anywhere.clear()
            fresh.add(s)
        if kind in _WHOLE:
            fresh.discard(s)
    return found


def to_run(found: dict[Action, State]) -> set[tuple[int, int]]:
    """(stage, micro-batch) of those with an action in a state that none before was in."""
    times = {action: time for time, action in enumerate(found)}
    parts: dict[tuple[int, int], list[Action]] = {}
    for action in found:
        parts.setdefault((action.stage, action.micro_batch), []).append(action)
    met: dict[State, int] = {}
    run = set()
    for part, actions in parts.items():
        if any(met.get(found[a], times[a]) >= times[a] for a in actions):
            run.add(part)
            for a in actions:
                met[found[a]] = min(times[a], met.get(found[a], times[a]))
    return run


@dataclass(frozen=True)
class _Storage:
    number: int


@dataclass
class _Record:
    """What an action made and dropped, by numbers of storages."""

    given: list[int] = field(default_factory=list)  # by stages before and after
    passed: list[int] = field(default_factory=list)  # to them
    kept: list[int] = field(default_factory=list)  # of both, for weight gradients that wait
    made: dict[int, tuple[Iterable[int], torch.dtype]] = field(default_factory=dict)  # and still there: shapes
    changes: list[Change] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)  # FSDP's buffers before
    left: dict[str, Any] = field(default_factory=dict)  # and after, those that are others
    turned: dict[int, bool] = field(default_factory=dict)  # switches


@dataclass
class _Gathered:
    """Whether the weights of a group are."""

    group: Any

    @property
    def on(self) -> bool:
        return self.group.is_unsharded

    def turn(self, on: bool) -> None:
        if on:
            self.group.unshard()
            self.group.wait_for_unshard()
            self.group._training_state = TrainingState.IDLE  # as after a forward
        else:
            self.group.reshard()


@dataclass
class _Graded:
    """Whether a weight has a gradient that waits for its reduction."""

    param: Any
    ledger: Ledger

    @property
    def on(self) -> bool:
        return hasattr(self.param, "_unsharded_param") and self.param._unsharded_param.grad is not None

    def turn(self, on: bool) -> None:
        weight = self.param._unsharded_param
        weight.grad = None
        if on:
            weight.grad = grad = torch.empty_like(weight)
            self.ledger.label(grad, Holds.gradients)


@dataclass
class _Here:
    """Whether a layer's experts are, of those that travel."""

    replicas: Replicas

    @property
    def on(self) -> bool:
        return self.replicas.here

    def turn(self, on: bool) -> None:
        if on:
            self.replicas.ready()
        else:
            self.replicas.free()


@dataclass
class _Left:
    """Whether they have gradients that wait for their owners."""

    replicas: Replicas
    ledger: Ledger

    @property
    def on(self) -> bool:
        return self.replicas.waits

    def turn(self, on: bool) -> None:
        replicas, low = self.replicas, self.replicas.dtype != self.replicas.owned[0].dtype
        found = [torch.empty(x.shape, dtype=p.dtype) for x, p in zip(replicas.leaves, replicas.owned, strict=True)]
        for x in found if on else ():
            self.ledger.label(x, Holds.gradients)
        replicas.sums = found if on and low else None
        for leaf, x in zip(replicas.leaves, found, strict=True):
            leaf.grad = x if on and not low else None


def repeating(ledger: Ledger, model: Transformer) -> type[Run]:
    """A run of a schedule that does not run again what ``ledger`` knows."""
    groups = [g for m in model.modules() if isinstance(m, FSDPModule) for g in param_groups(m)]

    def fsdp() -> Any:
        """What the groups share, once they have run."""
        return groups[0].comm_ctx if groups else None

    def buffers() -> dict[str, Any]:
        """FSDP's, storages for tensors."""
        found = {name: getattr(fsdp(), name) for name in _BUFFERS if hasattr(fsdp(), name)}
        return tree_map(lambda x: _Storage(ledger.number(x)) if isinstance(x, Tensor) else x, found)

    switches = [_Gathered(group) for group in groups]
    switches += [_Graded(p, ledger) for group in groups for p in group.fsdp_params]
    travelling = [x for layer in model.moe_layers() if (x := layer.experts.replicas) is not None]
    switches += [_Here(x) for x in travelling] + [_Left(x, ledger) for x in travelling]

    def positions() -> list[bool]:
        return [switch.on for switch in switches]

    class Repeating(Run):
        def __init__(self, pipe: Pipeline, *args: Any) -> None:
            super().__init__(pipe, *args)
            order, last = pipe.order(self.micro_batches)[0], len(pipe.stages) - 1
            self.states = states(order, self.micro_batches, last=last)
            self.real = to_run(self.states)
            self.records: dict[State, _Record] = {}
            self.record = _Record()
            self.positions = positions()
            self.messages: set[int] = set()  # storages of what stages pass
            self.kept: dict[tuple[int, int], list[int]] = {}  # of those, factors of weight gradients that wait
            self.kept_alike: dict[tuple[int, int], list[Tensor]] = {}

        def compute(self, action: Action) -> None:
            kind, s, m = action
            if (s, m) not in self.real:
                self._repeat(action, self.records[self.states[action]])
                return
            record = self.record = _Record(self.kept.pop((s, m), []), found=buffers())
            if kind in (Kind.backward, Kind.backward_input):
                record.given += [ledger.number(x) for x in self.flying[s, m].inputs]
            self._catch_up()
            start = ledger.time
            super().compute(action)
            before, self.positions = self.positions, positions()
            record.turned = {i: now for i, now in enumerate(self.positions) if now != before[i]}
            if kind is Kind.backward_input:
                factors = {ledger.number(x) for *_, g, y in self.queues[s, m] for x in (g, y)}
                record.kept = self.kept[s, m] = [x for x in [*record.given, *record.passed] if x in factors]
            record.left = {name: value for name, value in buffers().items() if value != record.found.get(name)}
            for x in _numbers(record.left):
                record.made[x] = (ledger.size(x),), torch.uint8
            others = self.messages - record.made.keys() - set(record.given)
            record.changes = [change for change in ledger.changes(start) if change[0] not in others]
            self.records.setdefault(self.states[action], record)

        def _catch_up(self) -> None:
            """Have all be as it would be, of which the ledger knows."""
            start = ledger.time
            for switch, on in zip(switches, self.positions, strict=True):
                if switch.on != on:
                    switch.turn(on)
            ledger.forget(start)

        def _repeat(self, action: Action, record: _Record) -> None:
            kind, s, m = action
            stage = self.pipe.stages[s]
            given = self.kept_alike.pop((s, m), [])
            if kind is Kind.forward:
                given = [] if stage.first else super()._take(Kind.receive_forward, s, m)
                self.flying[s, m] = InFlight(given)
            elif kind is not Kind.backward_weight:
                given = self.flying.pop((s, m)).inputs
                given = given + ([] if stage.last else super()._take(Kind.receive_backward, s, m))
                ledger.begin_backward()
            have = dict(zip(record.given, given, strict=True))
            del given
            buffer = {x: name for name, value in record.found.items() for x in _numbers(value)}
            for number, more in record.changes:
                if name := buffer.get(number):
                    setattr(fsdp(), name, [] if isinstance(getattr(fsdp(), name), list) else None)
                elif number in record.given:
                    have.pop(number)
                elif number not in record.made:
                    ledger.repeat(number, more)
                elif number not in have:
                    shape, dtype = record.made[number]
                    have[number] = x = torch.empty(*shape, dtype=dtype)
                    ledger.label(x, ledger.kind(number))
            for name, value in record.left.items():
                setattr(fsdp(), name, tree_map(lambda x: have[x.number] if isinstance(x, _Storage) else x, value))
            if record.kept:
                self.kept_alike[s, m] = [have[number] for number in record.kept]
            if record.passed:
                passed = [have[number] for number in record.passed]
                self.messages.update(ledger.number(x) for x in passed)
                super()._put(Kind.send_forward if kind is Kind.forward else Kind.send_backward, s, m, passed)
            for i, now in record.turned.items():
                self.positions[i] = now
            if kind in _WHOLE:
                self.left[s] -= 1

        def _take(self, kind: Kind, s: int, m: int) -> list[Tensor]:
            taken = super()._take(kind, s, m)
            self.record.given += (numbers := [ledger.number(x) for x in taken])
            self.messages.update(numbers)
            return taken

        def _put(self, kind: Kind, s: int, m: int, tensors: list[Tensor]) -> None:
            for x in tensors:
                self.record.passed.append(number := ledger.number(x))
                self.record.made[number] = x.shape, x.dtype
            self.messages.update(self.record.passed)
            super()._put(kind, s, m, tensors)

    return Repeating


def _numbers(tree: Any) -> set[int]:
    return {x.number for x in tree_leaves(tree) if isinstance(x, _Storage)}
