"""The time of one MoE layer in one step, forward and backward, under a placement; and what a policy is told it costs.

attention   other_flops * tokens, three times (forward once, backward twice)
compute     rows of the fullest rank, likewise
tokens      four all-to-alls: to the experts and back, and the gradients of both
experts     gathered under attention's forward, their gradients summed under its backward; what does not fit under it
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moetrain.moe.placement.types import Costs, Placement
from moetrain.simulate.cluster import Cluster


class Travel(Enum):
    """How an expert gets to many ranks."""

    direct = "direct"  # each copy from its owner, in one all-to-all
    relay = "relay"  # once into each node, by a broadcast along the nodes, then inside it


@dataclass(frozen=True)
class Layer:
    """The numbers of a layer that time depends on."""

    dim: int
    top_k: float  # assignments a token
    expert_params: int  # of one expert
    other_flops: float  # forward, a token: attention, shared experts, gate
    tokens: int  # of a rank
    act_bytes: int = 2  # a number of a row on its way
    weight_bytes: int = 2  # a parameter on its way
    gradient_bytes: int = 4  # its gradient on its way
    state_bytes: int = 16  # a parameter at its owner: master weight, gradient, two moments
    again: bool = False  # replicas are freed after forward and gathered again in backward
    travel: Travel = Travel.direct

    @property
    def rows(self) -> float:
        """Assignments of a rank's tokens."""
        return self.tokens * self.top_k

    def attention_us(self, cluster: Cluster) -> float:
        return 3 * self.other_flops * self.tokens / (cluster.peak * cluster.attention * 1e6)

    def row_us(self, cluster: Cluster) -> float:
        return 3 * 2 * self.expert_params / (cluster.peak * cluster.gemm * 1e6)

    def costs(self, cluster: Cluster, ranks: int) -> Costs:
        """What a policy plans with: the price of a row where all go to every rank alike, and of a copy of an expert
        where each rank sends one of its own to all others (relayed: where one rank does)."""
        row, hidden = self.row_us(cluster), self.attention_us(cluster)
        if ranks == 1:
            return Costs(row=row, hop=0.0, expert=0.0, hidden=hidden)
        hop = 4 * cluster.links(torch.full((ranks, ranks), float(self.dim * self.act_bytes))) / (ranks - 1)
        return Costs(row=row, hop=hop, expert=self.everywhere_us(cluster, ranks) / (ranks - 1), hidden=hidden)

    def everywhere_us(self, cluster: Cluster, ranks: int) -> float:
        """us for an expert of each rank, relayed of one rank, to go to all others, and their gradients back."""
        owner_E = torch.arange(1 if self.travel is Travel.relay else ranks)
        moved_RE = torch.arange(ranks)[:, None] != owner_E
        parts = (self.weight_bytes * (1 + self.again), self.gradient_bytes)
        return sum(_travel(self, cluster, moved_RE, owner_E, part * self.expert_params) for part in parts)


@dataclass(frozen=True)
class Price:
    """Of one layer in one step. Times in ms; bytes that leave a rank, mean over ranks."""

    attention: float
    compute: float
    tokens: float
    experts: float  # exposed
    token_bytes: float
    expert_bytes: float
    overload: float  # rows of the fullest rank / mean
    replicas: float  # experts that a rank holds and does not own, mean over ranks
    most_replicas: float

    @property
    def moe(self) -> float:
        return self.compute + self.tokens + self.experts


def price(
    placement: Placement, load_E: Tensor, *, layer: Layer, cluster: Cluster, travels: bool, regather: bool = True
) -> Price:
    """``load_E``: (E,) of any sum, which is scaled to the tokens of all ranks; each rank has an equal part of it.

    ``travels``: experts have one owner, replicas come from there. Else the ranks that hold the same ones keep an equal
    part of each and gather them, as FSDP2 does; ``regather``: again in backward.
    """
    R = placement.slots_RS.shape[0]
    sent_E = load_E.double() / load_E.sum() * layer.rows
    rows_RR = torch.zeros(R, R, dtype=torch.float64)
    rows_RR.scatter_add_(1, placement.peer_RE, sent_E.expand_as(placement.peer_RE))
    rows_R = rows_RR.sum(0)
    row_bytes = layer.dim * layer.act_bytes
    attention = layer.attention_us(cluster)
    if travels:
        own_RE = placement.owner_E == torch.arange(R)[:, None]
        moved_RE = placement.holds_RE & ~own_RE
        gather, reduce = (
            _travel(layer, cluster, moved_RE, placement.owner_E, part * layer.expert_params) + cluster.latency
            if moved_RE.any()
            else 0.0
            for part in (layer.weight_bytes, layer.gradient_bytes)
        )
        num_R = moved_RE.sum(1).double()
        replicas, most, again = float(num_R.mean()), float(num_R.max()), layer.again
    else:
        away = placement.num_slots * (1 - placement.span / R)
        gather, reduce = (
            _ring(cluster, R, placement.span, away * part * layer.expert_params)
            for part in (layer.weight_bytes, layer.gradient_bytes)
        )
        replicas, most, again = away, away, regather
    exposed = max(0.0, gather - attention / 3) + max(0.0, gather * again + reduce - attention * 2 / 3)
    return Price(
        attention=attention / 1e3,
        compute=layer.row_us(cluster) * float(rows_R.max()) / 1e3,
        tokens=4 * cluster.exchange(rows_RR * row_bytes) / 1e3,
        experts=exposed / 1e3,
        token_bytes=4 * float(rows_RR.sum() - rows_RR.diagonal().sum()) * row_bytes / R,
        expert_bytes=replicas * layer.expert_params * (layer.weight_bytes * (1 + again) + layer.gradient_bytes),
        overload=float(rows_R.max() / rows_R.mean()),
        replicas=replicas,
        most_replicas=most,
    )


def _travel(layer: Layer, cluster: Cluster, moved_RE: Tensor, owner_E: Tensor, size: float) -> float:
    """us for the experts of ``moved_RE`` to come from their owners; their gradients go the same ways back."""
    if layer.travel is Travel.relay:
        return cluster.relay(moved_RE, owner_E, size)
    R = moved_RE.shape[0]
    copies_RR = torch.zeros(R, R, dtype=torch.float64).index_add_(0, owner_E, moved_RE.T.double())
    return cluster.links(copies_RR * size)


def _ring(cluster: Cluster, ranks: int, span: int, size: float) -> float:
    """us of a ring all-gather among ranks ``span`` apart, each of which receives ``size`` bytes."""
    if not size:
        return 0.0
    node = cluster.node(ranks)
    if node == ranks:
        return cluster.latency + size / cluster.intra / 1e3
    return cluster.latency + size * min(span, node) / (node * cluster.inter) / 1e3
