"""A pipeline's micro-batches that do what others did: in the ledger, without being run again.

An action of a schedule makes and drops the same storages as the last one that met the same state. So of each stage
those micro-batches are run that come into a state first; the others write into the ledger what those did. What goes
from stage to stage is made and dropped for each, since that follows the schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.memory.ledger import Change, Ledger
from moetrain.parallel.pipeline import InFlight, Run
from moetrain.parallel.schedules import BACKWARDS, Action, Kind

State = tuple[Kind, int, bool, bool, int, tuple[Kind, int] | None]


def states(order: Sequence[Action], micro_batches: int) -> dict[Action, State]:
    """What decides which storages an action makes and drops: kind, stage, whether it is the first or the last of
    those, how many of the stage's weight gradients wait, and the action before, some of whose buffers it drops."""
    found: dict[Action, State] = {}
    done: dict[tuple[Kind, int], int] = {}
    waiting: dict[int, int] = {}
    before = None
    for action in order:
        kind, s, _ = action
        if kind is not Kind.forward and kind not in BACKWARDS:
            continue
        n = done[kind, s] = done.get((kind, s), 0) + 1
        late = waiting.get(s, 0)
        found[action] = kind, s, n == 1, n == micro_batches, min(late, 2), before
        waiting[s] = late + (kind is Kind.backward_input) - (kind is Kind.backward_weight)
        before = kind, s
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


@dataclass
class _Record:
    """Of an action: what it made and dropped; the storages of what it was given and of what it passes on."""

    given: list[int]
    made: dict[int, tuple[torch.Size, torch.dtype]]
    changes: list[Change]


def repeating(ledger: Ledger) -> type[Run]:
    """A run of a schedule that does not run again what ``ledger`` knows."""

    class Repeating(Run):
        def __init__(self, pipe, forward, shape, reduce, delivered, micro_batches: int) -> None:
            super().__init__(pipe, forward, shape, reduce, delivered, micro_batches)
            self.states = states(pipe.order(micro_batches)[0], micro_batches)
            self.real = to_run(self.states)
            self.records: dict[State, _Record] = {}
            self.record = _Record([], {}, [])
            self.messages: set[int] = set()  # storages of what stages pass

        def compute(self, action: Action) -> None:
            kind, s, m = action
            if (s, m) not in self.real:
                self._repeat(action, self.records[self.states[action]])
                return
            flying = [] if kind is Kind.backward_weight or kind is Kind.forward else self.flying[s, m].inputs
            record = self.record = _Record([ledger.number(x) for x in flying], {}, [])
            del flying
            start = ledger.time
            super().compute(action)
            others = self.messages - record.made.keys()
            record.changes = [c for c in ledger.changes(start) if c[0] not in others]
            self.records.setdefault(self.states[action], record)

        def _repeat(self, action: Action, record: _Record) -> None:
            kind, s, m = action
            stage = self.pipe.stages[s]
            given: list[Tensor] = []
            if kind is Kind.forward:
                given = [] if stage.first else super()._take(Kind.receive_forward, s, m)
                self.flying[s, m] = InFlight(given)
            elif kind is not Kind.backward_weight:
                given = self.flying.pop((s, m)).inputs
                given = given + ([] if stage.last else super()._take(Kind.receive_backward, s, m))
            have = dict(zip(record.given, given, strict=True))
            ledger.repeat(record.changes, record.made, have, backward=kind in BACKWARDS)
            if record.made:
                passed = [have[number] for number in record.made]
                self.messages.update(ledger.number(x) for x in passed)
                super()._put(Kind.send_forward if kind is Kind.forward else Kind.send_backward, s, m, passed)
            if kind in (Kind.backward, Kind.backward_weight):
                self.left[s] -= 1

        def _take(self, kind: Kind, s: int, m: int) -> list[Tensor]:
            taken = super()._take(kind, s, m)
            self.record.given += (numbers := [ledger.number(x) for x in taken])
            self.messages.update(numbers)
            return taken

        def _put(self, kind: Kind, s: int, m: int, tensors: list[Tensor]) -> None:
            self.record.made = {ledger.number(x): (x.shape, x.dtype) for x in tensors}
            self.messages.update(self.record.made)
            super()._put(kind, s, m, tensors)

    return Repeating
