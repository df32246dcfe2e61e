"""Policies over a history of loads: plan as a run would, price what comes of it, sum up.

The plan of step s is made beside step s - 1, from the mean load of the ``window`` steps up to s - 2; owners change
every ``reshard_every`` steps, by the mean load since they last did.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from moetrain import config as configs
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.travelling import Following, check, room
from moetrain.moe.placement.types import Costs, Grid, Placement, PlacementPolicy
from moetrain.simulate.cluster import Cluster
from moetrain.simulate.price import Layer, Price, Travel, price

GiB = 2**30
KNOWN = 2
"""The plan of step s knows loads up to s - 2."""


@dataclass(frozen=True)
class Sample:
    """How much of a history is priced: steps and layers, spread evenly."""

    steps: int = 8
    layers: int = 4


@dataclass(frozen=True)
class Outcome:
    """One policy on so many ranks: means over what was priced. Times in ms a layer and step."""

    policy: str
    ranks: int
    ep: int
    edp: int
    attention: float
    compute: float
    tokens: float
    experts: float
    reshard: float
    token_bytes: float
    expert_bytes: float
    replicas: float
    overload: float
    worst_overload: float
    owned_gib: float  # state of the experts that a rank owns, the fullest rank's
    replicas_gib: float  # weights of those that it does not, likewise, where most of them are there at once

    @property
    def moe(self) -> float:
        return self.compute + self.tokens + self.experts + self.reshard

    @property
    def layer(self) -> float:
        return self.moe + self.attention


def grid_of(experts: list[int], *, ranks: int, cluster: Cluster, policy: PlacementPolicy, layer: Layer) -> Grid:
    """ep as large as the experts allow, edp the rest."""
    ep = math.gcd(ranks, *experts)
    layers = 1 if layer.again else len(experts)
    grid = Grid(
        ranks // ep, ep, node=cluster.ranks_per_node if ranks > cluster.ranks_per_node else 0,
        room=room(policy, layer.expert_params * layer.weight_bytes * layers, layers),
    )  # fmt: skip
    check(grid, experts, policy)
    return grid


def run(
    name: str,
    policy: PlacementPolicy,
    loads: list[Tensor],
    *,
    layer: Layer,
    cluster: Cluster,
    ranks: int,
    steps: list[int],
    layers: list[int],
    regather: bool = True,
) -> Outcome:
    """``loads``: of each MoE layer (steps, E), of which ``steps`` and ``layers`` are priced. ``regather``: what
    static's ranks share out they gather again in backward."""
    grid = grid_of([x.shape[1] for x in loads], ranks=ranks, cluster=cluster, policy=policy, layer=layer)
    costs = layer.costs(cluster, ranks)
    policy = _planning(policy, costs, layer, ranks)
    every, window = reshard_every(policy), _window(policy)
    rows = ranks * layer.rows
    num_steps, kept = len(loads[0]), {}

    def mean(i: int, first: int, end: int) -> Tensor:
        """(E,) mean assignments a step of layer i over steps first .. end - 1; even where there are none."""
        load_E = loads[i][max(first, 0) : max(end, 0)].sum(0)
        load_E = load_E if load_E.any() else torch.ones_like(load_E)
        return load_E / load_E.sum() * rows

    def owners(step: int) -> list[Tensor]:
        since = step // every * every if every else 0
        if since not in kept:
            end = since - KNOWN + 1
            kept[since] = policy.owners([mean(i, end - every, end) for i in range(len(loads))], grid)
        return kept[since]

    found: list[Price] = []
    plan: Placement | None = None
    for s in steps:
        for i in layers:
            est_E = mean(i, s - KNOWN + 1 - window, s - KNOWN + 1)
            plan = _same(plan, policy(est_E, owners(s)[i], grid, costs))
            found.append(
                price(plan, loads[i][s], layer=layer, cluster=cluster, travels=policy.travels, regather=regather)
            )
    changes = range(every, num_steps, every) if every else ()
    moves = [_moved(owners(s - every), owners(s), layer, cluster, ranks) for s in changes]
    mean_of: Callable[[str], float] = lambda what: fmean(getattr(x, what) for x in found)  # noqa: E731
    own_R = torch.bincount(torch.cat(owners(steps[-1])), minlength=ranks) if policy.travels else None
    owned = int(own_R.max()) if own_R is not None else sum(x.shape[1] for x in loads) / ranks
    at_once = 1 if (layer.again if policy.travels else regather) else len(loads)
    return Outcome(
        policy=name, ranks=ranks, ep=grid.ep, edp=grid.edp,
        **{x: mean_of(x) for x in ("attention", "compute", "tokens", "experts", "token_bytes", "expert_bytes")},
        reshard=fmean(moves) / every / len(loads) if moves else 0.0,
        replicas=mean_of("replicas"), overload=mean_of("overload"), worst_overload=max(x.overload for x in found),
        owned_gib=owned * layer.expert_params * layer.state_bytes / GiB,
        replicas_gib=mean_of("most_replicas") * at_once * layer.expert_params * layer.weight_bytes / GiB,
    )  # fmt: skip


def reshard_every(policy: PlacementPolicy) -> int:
    """Steps; 0 = owners stay."""
    return policy.reshard_every if isinstance(policy, FSSDP) else 0


def _planning(policy: PlacementPolicy, costs: Costs, layer: Layer, ranks: int) -> PlacementPolicy:
    """Policies count copies, and relayed ones cost less than their number: fssdp sends as many experts as are hidden
    under attention, Hecate's overlap degree, unless it is told how many."""
    if layer.travel is Travel.direct or not isinstance(policy, FSSDP) or policy.overlap is not None or ranks == 1:
        return policy
    return configs.replace(policy, overlap=int(costs.hidden // (costs.expert * (ranks - 1))))


def _window(policy: PlacementPolicy) -> int:
    return policy.window if isinstance(policy, Following) else 0


def priced(policies: Iterable[PlacementPolicy], loads: list[Tensor], sample: Sample) -> tuple[list[int], list[int]]:
    """(steps, layers), the same for all policies; once all have dealt experts by load, where the history is so long."""
    num_steps = len(loads[0])
    starts = [max(reshard_every(p), _window(p) + KNOWN - 1) for p in policies]
    first = max((x for x in starts if x < num_steps), default=num_steps - 1)
    return _spread(first, num_steps, sample.steps), _spread(0, len(loads), sample.layers)


def _spread(first: int, end: int, number: int) -> list[int]:
    """At most ``number`` of first .. end - 1, each in the middle of its part."""
    number = min(number, end - first)
    return [first + (2 * i + 1) * (end - first) // (2 * number) for i in range(number)]


def _same(old: Placement | None, new: Placement) -> Placement:
    """The old one, which knows its tables already, where they are equal."""
    if (
        old
        and old.span == new.span
        and torch.equal(old.slots_RS, new.slots_RS)
        and torch.equal(old.owner_E, new.owner_E)
    ):
        return old
    return new


def _moved(before: list[Tensor], after: list[Tensor], layer: Layer, cluster: Cluster, ranks: int) -> float:
    """ms to bring experts, their optimizer state with them, from their owners to those that follow."""
    bytes_RR = torch.zeros(ranks, ranks, dtype=torch.float64)
    size = torch.tensor(float(layer.expert_params * layer.state_bytes), dtype=torch.float64)
    for old_E, new_E in zip(before, after, strict=True):
        bytes_RR.index_put_((old_E, new_E), size, accumulate=True)
    return cluster.exchange(bytes_RR) / 1e3
