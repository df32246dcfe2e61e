"""Fully sharded sparse data parallelism (Hecate, arXiv 2502.02581): hot experts travel, owners follow the load.

Two plans, both pure functions. ``__call__``, each step and layer: who holds a replica (sparse materialization,
Algorithm 1). ``owners``, every ``reshard_every`` steps, all layers of a stage together: who owns what (heterogeneous
sharding, Algorithm 2). R ranks, E experts of a layer, H those that may travel, in descending load.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moetrain.config import UserError, config
from moetrain.moe.placement.cost import Bools, Floats, Ints, everywhere, owned, replicated
from moetrain.moe.placement.travelling import Travelling, place
from moetrain.moe.placement.types import Costs, Grid, Placement, deal

EQUAL = 1 + 1e-9
"""Times that differ by less are one."""


@dataclass(frozen=True)
class Plan:
    """Who holds the experts of a list; what the layer then costs."""

    time: float  # us
    replicas: int
    order_H: Ints
    holds_HR: Bools


@config(group="placement", name="fssdp")
class FSSDP(Travelling):
    """``overlap`` experts of a layer travel at the most (null: those that pay); ``calibrate`` plans again in the step,
    once its load is known."""

    reshard_every: int = 100  # steps; 0 = owners stay
    overlap: int | None = None
    calibrate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reshard_every < 0:
            raise UserError(
                f"model.moe.placement.reshard_every={self.reshard_every}: owners are dealt anew every so many steps, "
                f"use 1 or more, or 0 for never"
            )
        if self.overlap is not None and self.overlap < 0:
            raise UserError(
                f"model.moe.placement.overlap={self.overlap}: so many experts of a layer travel at the most, use 0 or "
                f"more, or null for those that pay"
            )

    def __call__(self, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> Placement:
        """The least modelled time (``placement/cost.py``) of the candidates, of equal ones the fewest replicas.

        Candidates are the k hottest experts on every rank, k = 0 .. E; and as many replicas of each expert as bring its
        rows on a rank down to a share, for a range of shares. The paper has the t experts on every rank that travel
        hidden under other work, or replicas in proportion to load if memory is short: both are among them.
        """
        load, owner, R = load_E.double().numpy(), owner_E.numpy(), grid.ranks
        order_H = (-load).argsort(kind="stable")[: self.overlap]
        found = everywhere(order_H, load, owner, costs, R)
        time_C = found.time_C[: int((found.received_C <= _room(grid, len(load))).sum())]  # they never get fewer
        k = int((time_C <= time_C.min() * EQUAL).argmax())
        plans = [Plan(float(time_C[k]), k * (R - 1), order_H[:k], np.ones((k, R), bool))]
        plans += _shares(order_H, load, owner, grid, costs, beat=plans[0].time)
        least = min(plan.time for plan in plans)
        best = min((plan for plan in plans if plan.time <= least * EQUAL), key=lambda plan: plan.replicas)
        holds_RE = owner == np.arange(R)[:, None]
        holds_RE[:, best.order_H] = best.holds_HR.T
        return place(holds_RE, owner, grid, span=R)

    def owners(self, loads: list[Tensor], grid: Grid, costs: Costs) -> list[Tensor]:
        """Each layer's hottest experts, which travel anyhow, fill what the others leave; those are placed layer by
        layer, heaviest first, on the least loaded rank of the least loaded node. All have as many, within one.

        Equal loads: ``deal``.
        """
        if all((load_E == load_E[0]).all() for load_E in loads):
            return deal([len(load_E) for load_E in loads], grid.ranks)
        hot = self._overlap(grid, costs)
        load_LE = [load_E.double().numpy() for load_E in loads]
        order_LE = [(-load).argsort(kind="stable") for load in load_LE]
        owners = _least_loaded(load_LE, [order_E[hot:] for order_E in order_LE], grid)
        _fill(owners, [order_E[:hot] for order_E in order_LE], grid.ranks)
        return [torch.from_numpy(owner_E) for owner_E in owners]

    def _overlap(self, grid: Grid, costs: Costs) -> int | None:
        """Experts of a layer that travel hidden under other work and that a rank has room for; None: all."""
        hidden = int(costs.hidden // costs.expert) if costs.expert else None
        return min((n for n in (self.overlap, hidden, grid.room) if n is not None), default=None)


def _room(grid: Grid, experts: int) -> int:
    return experts if grid.room is None else grid.room


def _shares(order_H: Ints, load_E: Floats, owner_E: Ints, grid: Grid, costs: Costs, *, beat: float) -> list[Plan]:
    """Plans by how many rows of one expert a rank should have at the most: the hottest expert's halved, quartered, ..
    down to an eighth of a rank's even part; then round the best of these, in steps of down to an eighth of an octave.

    A share whose replicas alone take longer than ``beat`` or a plan before it ends the halving, and one that fills the
    room: even smaller ones have more replicas.
    """
    H, R, even = len(order_H), grid.ranks, float(load_E.sum()) / grid.ranks
    if R == 1 or not H or not even:
        return []
    load_H, owner_H, slots = load_E[order_H], owner_E[order_H], R * _room(grid, H)
    own_R = owned(load_E, owner_E, R)
    plans: dict[float, Plan] = {}

    def halved(times: float) -> bool:
        copies_H = _copies(load_H, float(load_H[0]) / 2**times, grid)
        moved = max(math.ceil(copies_H.sum() / R), int(np.bincount(owner_H, copies_H).max()))
        fits = int(copies_H.sum()) <= slots
        at_least = costs.row * even + costs.expert * moved - costs.hidden
        if fits and at_least > min([beat, *(plan.time for plan in plans.values())]):
            return False
        h = int((copies_H > 0).sum())
        holds_HR = _spread(copies_H[:h], load_H[:h], owner_H[:h], own_R, grid)
        time, replicas = replicated(order_H[:h], holds_HR, load_E, owner_E, costs, grid.node)
        plans[times] = Plan(time, replicas, order_H[:h], holds_HR)
        return fits

    octaves = max(1, math.ceil(math.log2(8 * load_H[0] / even)))
    for octave in range(1, octaves + 1):
        if not halved(float(octave)):
            break
    for step in (0.5, 0.25, 0.125) if plans else ():
        best = min(plans, key=lambda times: (plans[times].time, times))
        halved(best - step)
        halved(best + step)
    return list(plans.values())


def _copies(load_H: Floats, share: float, grid: Grid) -> Ints:
    """(H,) replicas that bring each expert's rows on a rank down to ``share``; more than one a node: as many on each,
    as tokens stay in their node."""
    R = grid.ranks
    nodes = R // min(grid.node or R, R)
    holders_H = np.ceil(load_H / share * (1 - 1e-12))
    if nodes > 1:
        holders_H = np.where(holders_H > nodes, np.ceil(holders_H / nodes) * nodes, holders_H)
    return np.clip(holders_H, 1, R).astype(np.int64) - 1


def _spread(copies_H: Ints, load_H: Floats, owner_H: Ints, rows_R: Floats, grid: Grid) -> Bools:
    """(H, R) who holds each expert: its owner and ``copies_H`` more as far as there is room, the hottest first, each on
    a node that has the fewest of the expert and, of those, on the rank with the fewest rows."""
    H, R = len(copies_H), grid.ranks
    node = min(grid.node or R, R)
    free_R = np.full(R, _room(grid, H))
    share_H = load_H / (1 + copies_H)
    rows_R = rows_R - np.bincount(owner_H, load_H - share_H, R)
    holds_HR = np.zeros((H, R), bool)
    holds_HR[np.arange(H), owner_H] = True
    for h, (copies, home) in enumerate(zip(copies_H.tolist(), owner_H.tolist(), strict=True)):
        rows_NR = np.where(free_R > 0, rows_R, np.inf).reshape(-1, node)
        rows_NR[home // node, home % node] = np.inf
        order_X = _fewest(rows_NR, home // node, copies)
        chosen_X = order_X[rows_NR.ravel()[order_X] < np.inf]
        holds_HR[h, chosen_X] = True
        free_R[chosen_X] -= 1
        rows_R[chosen_X] += share_H[h]
    return holds_HR


def _fewest(rows_NR: Floats, home: int, count: int) -> Ints:
    """Ranks with the fewest rows, one of each node before a second of any; node ``home`` has one already."""
    N, node = rows_NR.shape
    if N == 1:
        return rows_NR[0].argsort(kind="stable")[:count]
    if count < N:
        rank_N = rows_NR.argmin(1)
        rows_N = rows_NR[np.arange(N), rank_N]
        rows_N[home] = np.inf
        node_X = rows_N.argsort(kind="stable")[: min(count, N - 1)]
        return node_X * node + rank_N[node_X]
    each_N = np.full(N, (count + 1) // N)
    each_N[home] -= 1
    order_NR = rows_NR.argsort(1, kind="stable") + np.arange(N)[:, None] * node
    return order_NR[np.arange(node) < each_N[:, None]]


def _least_loaded(load_LE: list[Floats], cold_LX: list[Ints], grid: Grid) -> list[Ints]:
    """Owners (E,) of each layer's cold experts, heaviest first; -1 = a hot one."""
    R = grid.ranks
    node = min(grid.node or R, R)
    whole, extra = divmod(sum(map(len, load_LE)), R)
    used_R, used_N = [0] * R, [0] * (R // node)
    owners = [np.full(len(load_E), -1) for load_E in load_LE]
    for load_E, cold_X, owner_E in zip(load_LE, cold_LX, owners, strict=True):
        ranks_N = [[(0.0, used_R[r], r) for r in range(first, first + node)] for first in range(0, R, node)]
        for ranks in ranks_N:
            heapq.heapify(ranks)
        nodes = [(0.0, used_N[n], n) for n in range(R // node)]
        heapq.heapify(nodes)
        for e in cold_X.tolist():
            while True:
                node_rows, _, n = nodes[0]
                ranks = ranks_N[n]
                while ranks and used_R[ranks[0][2]] >= whole + (extra > 0):
                    heapq.heappop(ranks)
                if ranks:
                    break
                heapq.heappop(nodes)
            rows, _, r = ranks[0]
            extra -= used_R[r] == whole
            used_R[r] += 1
            used_N[n] += 1
            load = float(load_E[e])
            heapq.heapreplace(ranks, (rows + load, used_R[r], r))
            heapq.heapreplace(nodes, (node_rows + load, used_N[n], n))
            owner_E[e] = r
    return owners


def _fill(owners: list[Ints], hot_LX: list[Ints], ranks: int) -> None:
    """Hot experts into what the cold ones left: in each layer first to the ranks that own the fewest of its hot ones,
    of those to the ones that own the fewest of all."""
    whole, extra = divmod(sum(map(len, owners)), ranks)
    own_R = np.bincount(np.concatenate(owners) + 1, minlength=ranks + 1)[1:]
    extra -= int((own_R > whole).sum())
    for owner_E, hot_X in zip(owners, hot_LX, strict=True):
        hot_R = np.zeros(ranks, np.int64)
        for e in hot_X.tolist():
            full_R = own_R >= whole + (extra > 0)
            r = int(np.lexsort((own_R, hot_R, full_R))[0])
            owner_E[e] = r
            extra -= int(own_R[r] == whole)
            hot_R[r] += 1
            own_R[r] += 1
