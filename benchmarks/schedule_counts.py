"""What a pipeline schedule should idle: the textbooks' formulas, and its table counted action by action.

F, I, W: seconds of a chunk's forward, the backward of its input, that of its weights; a chunk is one stage of one
micro-batch. B = I + W, p ranks, m micro-batches, v stages a rank. An idle share is 1 - busy / makespan, averaged over
ranks, the makespan from the first action of any rank to the end of the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moetrain.parallel.schedules import RECEIVED_AS, STEP, Action, Kind, Schedule, Table

WORK = {Kind.forward: "F", Kind.backward: "B", Kind.backward_input: "I", Kind.backward_weight: "W"}


@dataclass(frozen=True)
class Times:
    """Seconds of a chunk."""

    forward: float = 1.0
    inputs: float = 1.0
    weights: float = 1.0

    @property
    def backward(self) -> float:
        return self.inputs + self.weights

    def of(self, action: Action) -> float:
        return {
            Kind.forward: self.forward, Kind.backward: self.backward, Kind.backward_input: self.inputs,
            Kind.backward_weight: self.weights,
        }[action.kind]  # fmt: skip


@dataclass(frozen=True)
class Span:
    """An action that computes, and when it did."""

    action: Action
    start: float
    end: float


Line = list[Span]
"""What a rank computed, in order."""


BOOKS = {
    Schedule.one_f_one_b: ("(p-1)(F+B)", "arXiv 2104.04473, 2.2.1: (p-1)/m of the work"),
    Schedule.interleaved: ("(p-1)(F+B)", "arXiv 2104.04473, 2.2.2: (p-1)/(v m) of the work"),
    Schedule.interleaved_zero_bubble: ("(p-1)(F+B-2W)", "arXiv 2401.10241, ZB-H1, with a chunk in place of a stage"),
    Schedule.zbv: ("0 where F = I = W", "arXiv 2401.10241, 6: each rank from its own start to its own end"),
    Schedule.dualpipev: ("(p-1)(F+2B-3W)", "DualPipe's (PP/2-1)(F&B+B-3W) with PP = 2p stages, F&B = F+B"),
}
"""Idle seconds of a rank in a step, F, B, W of a chunk; and who says so."""


def textbook(schedule: Schedule, times: Times, *, pp: int, chunks: int, micro_batches: int) -> float | None:
    """The textbook's idle share; None where it has no figure for such times."""
    f, b, w = times.forward, times.backward, times.weights
    bubble = {
        Schedule.one_f_one_b: (pp - 1) * (f + b),  # here a stage is all that the rank has
        Schedule.interleaved: (pp - 1) * (f + b),
        Schedule.interleaved_zero_bubble: (pp - 1) * (f + b - 2 * w),
        Schedule.zbv: 0.0 if f == times.inputs == w else None,
        Schedule.dualpipev: (pp - 1) * (f + 2 * b - 3 * w),
    }[schedule]
    return None if bubble is None else bubble / (bubble + chunks * micro_batches * (f + b))


def counted(order: Table, seconds: Callable[[Action], float], *, delay: float = 0.0) -> list[Line]:
    """What each rank would compute when: an action starts as soon as its rank and its message are there.

    A message travels from when both its send and its receive have been reached, for ``delay`` seconds.
    """
    lines: list[Line] = [[] for _ in order]
    now, at = [0.0] * len(order), [0] * len(order)
    sent: dict[Action, float] = {}
    posted: list[dict[Action, float]] = [{} for _ in order]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(order):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                kind, s, m = action
                if kind in RECEIVED_AS:
                    sent[Action(RECEIVED_AS[kind], s + STEP[kind], m)] = now[rank]
                elif kind not in WORK:
                    posted[rank][action] = now[rank]
                else:
                    needs = Action(Kind.receive_forward if kind is Kind.forward else Kind.receive_backward, s, m)
                    if needs in posted[rank] and kind is not Kind.backward_weight:
                        if needs not in sent:
                            break
                        now[rank] = max(now[rank], max(sent[needs], posted[rank][needs]) + delay)
                    lines[rank].append(Span(action, now[rank], now[rank] + seconds(action)))
                    now[rank] = lines[rank][-1].end
                at[rank] += 1
                moved = True
    assert all(i == len(actions) for i, actions in zip(at, order, strict=True)), "the table deadlocks"
    return lines


def idle(lines: Sequence[Line]) -> float:
    """Share of the common makespan in which a rank computes nothing, averaged over ranks."""
    makespan = max(line[-1].end for line in lines) - min(line[0].start for line in lines)
    return 1 - sum(_busy(line) for line in lines) / makespan / len(lines)


def idle_within(lines: Sequence[Line]) -> float:
    """The same of each rank's own time, from its first action to the end of its last."""
    return sum(1 - _busy(line) / (line[-1].end - line[0].start) for line in lines) / len(lines)


def _busy(line: Line) -> float:
    return sum(span.end - span.start for span in line)


def in_flight(actions: Sequence[Action], *, chunks: int) -> float:
    """The most a rank holds at once, in micro-batches of all its stages: from a forward to the end of its backward."""
    held = most = 0
    for kind, _, _ in actions:
        held += (kind is Kind.forward) - (kind in (Kind.backward, Kind.backward_weight))
        most = max(most, held)
    return most / chunks


def drawing(lines: Sequence[Line], *, width: int = 104) -> list[str]:
    """A line of text a rank: a micro-batch's letter, small for forwards, large for backwards; + weights, . idle."""
    first, last = min(line[0].start for line in lines), max(line[-1].end for line in lines)
    rows = []
    for line in lines:
        row = ["."] * width
        for span in line:
            letter = chr(ord("a") + span.action.micro_batch % 26)
            mark = {Kind.forward: letter, Kind.backward_weight: "+"}.get(span.action.kind, letter.upper())
            a, b = (round((t - first) / (last - first) * width) for t in (span.start, span.end))
            row[a:b] = mark * (b - a)
        rows.append("".join(row))
    return rows
