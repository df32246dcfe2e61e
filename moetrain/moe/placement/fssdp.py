"""Fully sharded sparse data parallelism (Hecate, arXiv 2502.02581): hot experts travel, owners follow the load.

Two plans, both pure functions. ``__call__``, each step and layer: who holds a replica (sparse materialization,
Algorithm 1). ``owners``, every ``reshard_every`` steps, all layers of a stage together: who owns what (heterogeneous
sharding, Algorithm 2). R ranks, E experts of a layer, H those that may travel, in descending load.
"""

import heapq

import numpy as np
import torch
from torch import Tensor

from moetrain.config import UserError, config
from moetrain.moe.placement.cost import Bools, Floats, Ints, owned_rows, prefixes
from moetrain.moe.placement.travelling import Travelling, place
from moetrain.moe.placement.types import Costs, Grid, Placement, deal

EQUAL = 1 + 1e-9
"""Times that differ by less are one."""


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

        Candidates are the k hottest experts on every rank, k = 0 .. E; and where memory is short, replicas in
        proportion to load, again the k hottest experts' only. The paper stops at the t experts that travel hidden
        under other work; here whatever the model says pays, so that it chooses among more, never among fewer.
        """
        load, owner, R = load_E.double().numpy(), owner_E.numpy(), grid.ranks
        order_H = (-load).argsort(kind="stable")[: self.overlap]
        lists = [np.ones((len(order_H), R), bool)]
        if grid.room is not None and grid.room < len(load):
            lists.append(_in_proportion(order_H, load, owner, grid))
        found = [prefixes(order_H, holds_HR, load, owner, costs, node=grid.node, room=grid.room) for holds_HR in lists]
        time_LC = np.stack([np.where(c.fits_C, c.time_C, np.inf) for c in found])
        replicas_LC = np.stack([c.replicas_C for c in found])
        best, k = divmod(int(np.where(time_LC <= time_LC.min() * EQUAL, replicas_LC, R * R * len(load)).argmin()),
                         time_LC.shape[1])  # fmt: skip
        holds_RE = owner == np.arange(R)[:, None]
        holds_RE[:, order_H[:k]] = lists[best][:k].T
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


def _in_proportion(order_H: Ints, load_E: Floats, owner_E: Ints, grid: Grid) -> Bools:
    """(H, R): as many replicas as there is room for, to each expert in proportion to its load, the hottest first, each
    on the node that has the fewest of the expert and, of those, on the rank with the fewest rows."""
    R = grid.ranks
    room = len(load_E) if grid.room is None else grid.room
    load_H, owner_H = load_E[order_H], owner_E[order_H]
    copies_H = np.minimum(np.ceil(load_H / max(load_H.sum(), 1e-300) * R * room), R - 1).astype(np.int64)
    return spread(copies_H, load_H, owner_H, owned_rows(load_E, owner_E, R), grid)


def spread(copies_H: Ints, load_H: Floats, owner_H: Ints, rows_R: Floats, grid: Grid) -> Bools:
    """(H, R) who holds each expert: its owner and ``copies_H`` more, as far as there is room."""
    H, R = len(copies_H), grid.ranks
    node = min(grid.node or R, R)
    free_R = np.full(R, H if grid.room is None else grid.room)
    share_H = load_H / (1 + copies_H)
    rows_R = rows_R - np.bincount(owner_H, load_H - share_H, R)
    holds_HR = np.zeros((H, R), bool)
    holds_HR[np.arange(H), owner_H] = True
    for h in range(H):
        if not copies_H[h]:
            continue
        open_R = (free_R > 0) & ~holds_HR[h]
        order_R = np.where(open_R, rows_R, np.inf).argsort(kind="stable")[: open_R.sum()]
        if node < R:
            order_R = order_R[_round(order_R // node, int(owner_H[h]) // node).argsort(kind="stable")]
        chosen_R = order_R[: copies_H[h]]
        holds_HR[h, chosen_R] = True
        free_R[chosen_R] -= 1
        rows_R[chosen_R] += share_H[h]
    return holds_HR


def _round(node_X: Ints, taken: int) -> Ints:
    """(X,) the node of each place -> how many places of its node come before it; ``taken`` has one already."""
    order_X = node_X.argsort(kind="stable")
    sorted_X = node_X[order_X]
    round_X = np.empty_like(node_X)
    round_X[order_X] = np.arange(len(node_X)) - np.searchsorted(sorted_X, sorted_X)
    return round_X + (node_X == taken)


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
