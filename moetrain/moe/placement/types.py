"""Where experts live, as data, and who decides it: a policy is a pure function from load to placement.

R ranks of a grid, E experts of a layer, S slots a rank; the other letters are those of ``moe/types.py``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from moetrain.config import config
from moetrain.moe.types import LayoutDependence


@dataclass(frozen=True)
class Grid:
    """The edp x ep ranks of a stage that experts are placed on, row-major."""

    edp: int
    ep: int
    node: int = 0  # consecutive ranks that share a machine; 0 = all
    room: int | None = None  # replicas of a layer that a rank has memory for; None = any number

    @property
    def ranks(self) -> int:
        return self.edp * self.ep


@dataclass(frozen=True)
class Costs:
    """What a step costs a rank in one MoE layer, forward and backward together, in microseconds; alike on all ranks."""

    row: float  #    computing one assignment
    hop: float  #    carrying one assignment to another rank, and back
    expert: float  # receiving (or sending) one expert, and sending (receiving) its gradient
    hidden: float  # other work of the layer, attention, under which experts travel at no cost
    shared: float = 1.0  # ranks that take turns on one processor: while some wait, the others are faster


FREE = Costs(row=1.0, hop=0.0, expert=0.0, hidden=0.0)
"""Nothing but computing costs time."""


@dataclass(frozen=True)
class Placement:
    """Where experts live: ``slots_RS[r, s]`` is the expert in slot s of rank r (or -1), ``owner_E[e]`` who optimizes e.

    Ranks are the stage's edp x ep ranks. Tokens travel among ``span`` consecutive ones: an ep row under static
    expert parallelism, all of them where any rank may hold a replica, one where every rank holds every expert. A token
    goes to its own rank's replica, else to one of the same ``node`` (consecutive ranks, 0 = all), else to any: ranks
    that have to choose among several take turns. Tables for planning are on the CPU.
    """

    slots_RS: Tensor  # (R, S) int64
    owner_E: Tensor  #  (E,) int64
    span: int
    node: int = 0
    _device_tables: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        held_GE = self.holds_RE.view(-1, self.span, self.owner_E.numel()).any(1)
        if not held_GE.all():
            g = int((~held_GE.all(1)).nonzero()[0])
            lost = (~held_GE[g]).nonzero().flatten().tolist()
            raise ValueError(
                f"placement leaves experts {lost} without a slot on ranks {g * self.span}..{(g + 1) * self.span}"
            )

    @property
    def num_slots(self) -> int:
        return self.slots_RS.shape[1]

    @cached_property
    def holds_RE(self) -> Tensor:
        """(R, E) bool."""
        held_RE = torch.zeros(self.slots_RS.shape[0], self.owner_E.numel() + 1, dtype=torch.bool)
        return held_RE.scatter_(1, self.slots_RS.where(self.slots_RS >= 0, self.owner_E.numel()), True)[:, :-1]

    @cached_property
    def peer_RE(self) -> Tensor:
        """(R, E) int64: the rank that each rank sends its tokens of an expert to."""
        R, E = self.holds_RE.shape
        node = min(self.node or self.span, self.span)
        peer_RE = _in_turn(self.holds_RE, self.span)
        if node < self.span:
            near_RE = _in_turn(self.holds_RE, node)
            peer_RE = torch.where(near_RE < 0, peer_RE, near_RE)
        return torch.where(self.holds_RE, torch.arange(R)[:, None].expand(R, E), peer_RE)

    def peers_of(self, rank: int) -> Tensor:
        """(E,) int64: that rank's row of ``peer_RE``, without the others."""
        peer_E = torch.full_like(self.owner_E, -1)
        for run in (self.span, min(self.node or self.span, self.span), 1):
            start = rank // run * run
            holds_XE = self.holds_RE[start : start + run]
            turn_E = ((~holds_XE[: rank - start + 1]).sum(0) - 1).clamp_min(0) % holds_XE.sum(0).clamp_min(1)
            holder_E = (holds_XE.cumsum(0) == turn_E + 1).int().argmax(0) + start
            peer_E = torch.where(holds_XE.any(0), holder_E, peer_E)
        return peer_E

    def same(self, other: "Placement") -> bool:
        """Whether it is the same for every rank."""
        return torch.equal(self.slots_RS, other.slots_RS) and torch.equal(self.owner_E, other.owner_E)

    def slots_of(self, rank: int) -> list[int]:
        """Expert ids in the slots of a rank, in slot order."""
        return [e for e in self.slots_RS[rank].tolist() if e >= 0]

    def target_EJ(self, rank: int, device: torch.device, *, etp: int = 1) -> Tensor:
        """(E, J) int64 on ``device``: the slots that rank sends each expert's tokens to, as peer * S + slot.

        Peers are the ranks of its span, each ``etp`` times: J = etp ranks hold a slice of an expert's width each.
        """
        table = self._device_tables.get((rank, etp, device))
        if table is None and device.type != "cpu":
            self._device_tables[rank, etp, device] = table = self.target_EJ(rank, torch.device("cpu"), etp=etp).to(
                device
            )
        if table is None:
            peer_E = self.peers_of(rank)
            slot_E1 = (self.slots_RS[peer_E] == torch.arange(len(peer_E))[:, None]).int().argmax(1, keepdim=True)
            peer_E1 = peer_E[:, None] % self.span
            table = (peer_E1 * etp + torch.arange(etp)) * self.num_slots + slot_E1
            self._device_tables[rank, etp, device] = table
        return table


def _in_turn(holds_RE: Tensor, run: int) -> Tensor:
    """(R, E) int64: of the ``run`` consecutive ranks that a rank is one of, one that holds each expert, -1 = none.

    Those that hold it not take the holders in turn.
    """
    R, E = holds_RE.shape
    holds_GRE = holds_RE.view(-1, run, E)
    count_G1E = holds_GRE.sum(1, keepdim=True)
    turn_GRE = ((~holds_GRE).cumsum(1) - 1).clamp_min(0) % count_G1E.clamp_min(1)
    holder_GRE = holds_GRE.int().argsort(dim=1, descending=True, stable=True)  # the holders first, in order of rank
    first_G11 = (torch.arange(R // run) * run)[:, None, None]
    return torch.where(count_G1E > 0, holder_GRE.gather(1, turn_GRE) + first_G11, -1).view(R, E)


@config
class PlacementPolicy(ABC):
    """Load -> who sits where. Pure and deterministic, so every rank plans the same thing."""

    @property
    def travels(self) -> bool:
        """Whether experts travel: each has one owner among all ranks of the stage, where all of its state lies."""
        return False

    @property
    def depends_on_layout(self) -> LayoutDependence | None:
        return None

    def span(self, grid: Grid) -> int:
        """How many consecutive ranks of the grid tokens travel among."""
        return grid.ranks if self.travels else grid.ep

    def owners(self, loads: list[Tensor], grid: Grid) -> list[Tensor]:
        """(E,) mean assignments a step of every expert, for each MoE layer of a stage -> (E,) int64 who owns each."""
        return deal([len(load_E) for load_E in loads], grid.ranks)

    @abstractmethod
    def __call__(self, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> Placement:
        """(E,) mean assignments a step, (E,) int64 -> the placement of one layer for one step.

        A rank's slots are the experts that it owns, by id, then its replicas by (owner, id).
        """


def deal(experts: list[int], ranks: int) -> list[Tensor]:
    """Who owns each expert of layers with so many: consecutive ones, the rest of a layer goes on where the last ended.

    Over all layers together no rank has two more than another; where ``ranks`` divides a layer's, all have as many.
    """
    owners, done = [], 0
    for E in experts:
        whole, rest = divmod(E, ranks)
        count_R = torch.full((ranks,), whole)
        count_R[(done + torch.arange(rest)) % ranks] += 1
        owners.append(torch.arange(ranks).repeat_interleave(count_R))
        done += rest
    return owners
