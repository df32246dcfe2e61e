"""Pipeline schedules as tables: what each rank of a pipeline does, in order. The orders are torch's own.

1f1b                     one stage a rank (arXiv 1806.03377, 2006.09503)
interleaved              ``chunks`` stages a rank, dealt in turn (2104.04473)
interleaved_zero_bubble  the same, weight gradients put off into the bubbles (2401.10241)
zbv                      two stages a rank, laid as a V, weight gradients put off (2401.10241, section 6)
dualpipev                the same V, a forward beside each backward (2412.19437; DeepSeek's DualPipe)
"""

import functools
from collections.abc import Iterator
from enum import Enum
from types import SimpleNamespace
from typing import NamedTuple

from torch import nn
from torch.distributed.pipelining import schedules as torchs

from moetrain.config import UserError, config, nearest


class Schedule(Enum):
    one_f_one_b = "1f1b"
    interleaved = "interleaved"
    interleaved_zero_bubble = "interleaved_zero_bubble"
    zbv = "zbv"
    dualpipev = "dualpipev"

    @property
    def is_v(self) -> bool:
        return self in (Schedule.zbv, Schedule.dualpipev)

    @property
    def is_dealt(self) -> bool:
        """Whether stages are dealt to the ranks in turn, ``chunks`` each, and micro-batches in equal rounds."""
        return self in (Schedule.interleaved, Schedule.interleaved_zero_bubble)

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients wait (``deferred.py``)."""
        return self in (Schedule.interleaved_zero_bubble, Schedule.zbv, Schedule.dualpipev)


@config
class PipelineConfig:
    """``stages``: layers of each stage, in order, embedding and head not counted; None = as even as costs allow.

    ``chunks``: stages a rank has under an interleaved schedule; 1f1b has one, the V schedules two.
    """

    schedule: str = "1f1b"
    chunks: int = 2
    stages: list[int] | None = None

    def __post_init__(self) -> None:
        if self.schedule not in (names := [s.value for s in Schedule]):
            raise UserError(
                f"pipeline.schedule={self.schedule}: no such schedule{nearest(self.schedule, names)} (there are: "
                f"{', '.join(names)})"
            )
        if self.chunks < 1:
            raise UserError(f"pipeline.chunks={self.chunks}: a rank has at least one stage")
        if self.stages is not None and min(self.stages, default=0) < 1:
            raise UserError(f"pipeline.stages={self.stages}: each stage takes at least one layer")

    @property
    def order(self) -> Schedule:
        return Schedule(self.schedule)

    @property
    def stages_a_rank(self) -> int:
        if self.order is Schedule.one_f_one_b:
            return 1
        return 2 if self.order.is_v else self.chunks

    def rank_of(self, stage: int, *, pp: int) -> int:
        """The pipeline rank that has a stage."""
        return 2 * pp - 1 - stage if self.order.is_v and stage >= pp else stage % pp

    def stages_of(self, rank: int, *, pp: int) -> list[int]:
        """A pipeline rank's stages, in order."""
        return [s for s in range(pp * self.stages_a_rank) if self.rank_of(s, pp=pp) == rank]


class Kind(Enum):
    forward = "F"
    backward = "B"
    backward_input = "I"  # of the stage's input only
    backward_weight = "W"  # the rest of it
    send_forward = "SEND_F"
    receive_forward = "RECV_F"
    send_backward = "SEND_B"
    receive_backward = "RECV_B"


BACKWARDS = {Kind.backward, Kind.backward_input, Kind.backward_weight}
RECEIVED_AS = {Kind.send_forward: Kind.receive_forward, Kind.send_backward: Kind.receive_backward}
STEP = {Kind.send_forward: 1, Kind.send_backward: -1}
"""From the stage that sends to the one that receives."""
_USES = {
    Kind.forward: Kind.send_forward, Kind.backward: Kind.send_backward, Kind.backward_input: Kind.send_backward
}  # fmt: skip


class Action(NamedTuple):
    kind: Kind
    stage: int
    micro_batch: int


def too_few(cfg: PipelineConfig, *, pp: int, micro_batches: int) -> str | None:
    """Why a schedule cannot run that many micro-batches, and which it can; or None."""
    n = micro_batches
    if cfg.order is Schedule.dualpipev and n < 2 * pp:
        return f"pipeline.schedule=dualpipev needs 2 * layout.pp = {2 * pp} micro-batches a step or more, there are {n}"
    if cfg.order.is_dealt and n % max(1, n // pp):
        return (
            f"pipeline.schedule={cfg.schedule} deals micro-batches in equal rounds of at least layout.pp={pp}: "
            f"{n} do not divide into {n // pp}"
        )
    return None


Table = tuple[tuple[Action, ...], ...]
"""Rank of the pipeline -> its actions."""


@functools.lru_cache(maxsize=64)
def table(schedule: Schedule, *, pp: int, chunks: int, micro_batches: int, backward: bool = True) -> Table:
    """What each of ``pp`` ranks does, in order; ``chunks`` stages a rank. Without ``backward``, stage after stage."""
    cfg = PipelineConfig(schedule=schedule.value, chunks=chunks)
    if not backward:
        found = _lowered(cfg, {rank: _forwards(cfg, rank, pp, micro_batches) for rank in range(pp)}, pp)
    elif schedule is Schedule.one_f_one_b:
        found = _lowered(cfg, {rank: _one_f_one_b(rank, pp, micro_batches) for rank in range(pp)}, pp)
    else:
        shape = SimpleNamespace(num_stages=pp * chunks, group_size=pp, group_rank=0, submod=nn.Identity())
        found = getattr(torchs, _TORCHS[schedule])([shape] * chunks, micro_batches).pipeline_order_with_comms
    return tuple(tuple(_sends_at_once(_actions(found[rank]))) for rank in range(pp))


@functools.lru_cache(maxsize=64)
def delivered(
    rank: int, schedule: Schedule, *, pp: int, chunks: int, micro_batches: int, backward: bool = True
) -> dict[Action, tuple[Action, ...]]:
    """Receive -> the sends of ``rank`` that must have been used when it has come: what was sent need be kept no longer.

    The peer used one before it sent the other. Sends without such a receive are not there.
    """
    cfg = PipelineConfig(schedule=schedule.value, chunks=chunks)
    orders = table(schedule, pp=pp, chunks=chunks, micro_batches=micro_batches, backward=backward)
    found: dict[Action, list[Action]] = {}
    for peer in range(pp):
        reply: Action | None = None  # the peer's next message to this rank, as this rank receives it
        for action in reversed(orders[peer]):
            kind, s, m = action
            if kind in RECEIVED_AS and cfg.rank_of(s + STEP[kind], pp=pp) == rank:
                reply = Action(RECEIVED_AS[kind], s + STEP[kind], m)
            sent = _USES.get(kind)
            source = -1 if sent is None else s - STEP[sent]
            if sent and reply and 0 <= source < pp * cfg.stages_a_rank and cfg.rank_of(source, pp=pp) == rank != peer:
                found.setdefault(reply, []).append(Action(sent, source, m))
    return {receive: tuple(sends) for receive, sends in found.items()}


def _lowered(cfg: PipelineConfig, actions: dict[int, list], pp: int) -> dict[int, list]:
    """With sends and receives, in an order that cannot deadlock."""
    return torchs._add_send_recv(actions, lambda s: cfg.rank_of(s, pp=pp), pp * cfg.stages_a_rank)


def _forwards(cfg: PipelineConfig, rank: int, pp: int, n: int) -> list:
    return [torchs._Action(s, torchs.FORWARD, m) for s in cfg.stages_of(rank, pp=pp) for m in range(n)]


def _actions(theirs: list) -> list[Action]:
    """Without what torch's own runtime does about FSDP; a forward beside a backward is one after the other."""
    kinds = {getattr(torchs, name): kind for name, kind in _KINDS.items()}
    found = []
    for action in theirs:
        for a in action.sub_actions or (action,):
            if kind := kinds.get(a.computation_type):
                found.append(Action(kind, a.stage_index, a.microbatch_index))
    return found


def _sends_at_once(actions: list[Action]) -> Iterator[Action]:
    """Each send directly after what it sends: torch's come after a forward and the backward beside it, which here are
    one after the other, and the next rank would wait for both."""
    sends = {a for a in actions if a.kind in RECEIVED_AS}
    for action in (a for a in actions if a.kind not in RECEIVED_AS):
        yield action
        sent = _USES.get(action.kind)
        if sent is not None and (send := action._replace(kind=sent)) in sends:
            yield send


def _one_f_one_b(rank: int, pp: int, n: int) -> list:
    def act(kind, m: int):
        return torchs._Action(rank, kind, m)

    ahead = min(n, pp - 1 - rank)  # forwards before the first backward
    found = [act(torchs.FORWARD, m) for m in range(ahead)]
    for m in range(n):
        if m + ahead < n:
            found.append(act(torchs.FORWARD, m + ahead))
        found.append(act(torchs.FULL_BACKWARD, m))
    return found


_TORCHS = {
    Schedule.interleaved: "ScheduleInterleaved1F1B",
    Schedule.interleaved_zero_bubble: "ScheduleInterleavedZeroBubble",
    Schedule.zbv: "ScheduleZBVZeroBubble",
    Schedule.dualpipev: "ScheduleDualPipeV",
}
_KINDS = {
    "FORWARD": Kind.forward,
    "FULL_BACKWARD": Kind.backward,
    "BACKWARD_INPUT": Kind.backward_input,
    "BACKWARD_WEIGHT": Kind.backward_weight,
    "SEND_F": Kind.send_forward,
    "RECV_F": Kind.receive_forward,
    "SEND_B": Kind.send_backward,
    "RECV_B": Kind.receive_backward,
}
