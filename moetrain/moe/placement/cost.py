"""What a placement costs: the modelled time of one MoE layer in a step, and of many candidate placements at once.

    time = row * max_r rows_r + hop * max_r max(away_r, arrived_r)
           + max(0, expert * max_r max(sent_r, received_r) - hidden)

rows_r: assignments that rank r computes; away_r and arrived_r: those that it sends to, and gets from, other ranks;
sent_r and received_r: experts likewise, each copy counted. Every rank routes load_e / R assignments to expert e. Other
letters: C candidates, H experts that may travel, in the order in which they are taken.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetrain.moe.placement.types import Costs, Placement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Modelled:
    """Of one layer in one step. Counts are of the rank that has the most; times are in microseconds."""

    rows: float  #     assignments that a rank computes
    mean_rows: float
    hops: float  #     assignments that a rank sends to others, or gets from them, whichever are more
    sent: int  #       copies of experts that a rank sends
    received: int
    compute_us: float
    hop_us: float
    travel_us: float  # what is left of the experts' travel when ``hidden`` is over

    @property
    def time_us(self) -> float:
        return self.compute_us + self.hop_us + self.travel_us

    @property
    def overload(self) -> float:
        """Assignments of the busiest rank over those of the average one; 1 without any."""
        return self.rows / self.mean_rows if self.mean_rows else 1.0


def modelled(placement: Placement, load_E: Tensor, costs: Costs, *, travels: bool = True) -> Modelled:
    """(E,) mean assignments a step -> what the layer costs. ``travels``: experts lie at their owners alone at first."""
    holds_RE, peer_RE = placement.holds_RE, placement.peer_RE
    R = holds_RE.shape[0]
    share_RE = (load_E.double() / R).expand_as(peer_RE)
    rows_R = torch.zeros(R, dtype=torch.float64).scatter_add_(0, peer_RE.flatten(), share_RE.flatten())
    stay_R = (share_RE * holds_RE).sum(1)
    hops = float(torch.maximum(share_RE.sum(1) - stay_R, rows_R - stay_R).max().clamp_min(0))
    moved_RE = holds_RE & (placement.owner_E != torch.arange(R)[:, None]) & travels
    sent_R = torch.zeros(R, dtype=torch.int64).scatter_add_(0, placement.owner_E, moved_RE.sum(0))
    rows, sent, received = float(rows_R.max()), int(sent_R.max()), int(moved_RE.sum(1).max())
    return Modelled(
        rows=rows, mean_rows=float(rows_R.mean()), hops=hops, sent=sent, received=received,
        compute_us=costs.row * rows, hop_us=costs.hop * hops,
        travel_us=max(0.0, costs.expert * max(sent, received) - costs.hidden),
    )  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """The first c of a list of experts hold what the list gives them, the others stay at their owners: c = 0 .. H."""

    time_C: Floats
    replicas_C: Ints
    fits_C: Bools  # into the room that ranks have


def prefixes(
    order_H: Ints, holds_HR: Bools, load_E: Floats, owner_E: Ints, costs: Costs, *, node: int, room: int | None
) -> Candidates:
    """Every prefix of a list of experts and of who would hold them, the owner always among those."""
    (H, R), owner_H, share_H1 = holds_HR.shape, owner_E[order_H], load_E[order_H, None] / holds_HR.shape[1]
    at = (np.arange(H), owner_H)
    more_HR = share_H1 * arrivals(holds_HR, node)
    more_HR[at] -= load_E[order_H]
    rows_CR = _after(owned_rows(load_E, owner_E, R), more_HR)
    copies_HR = holds_HR.astype(np.int32)
    copies_HR[at] = 0
    stay_CR = _after(owned_rows(load_E, owner_E, R) / R, share_H1 * copies_HR)
    received_CR = _after(np.zeros(R, np.int32), copies_HR)
    copies_H = copies_HR.sum(1)
    sent_HR = np.zeros((H, R), np.int32)
    sent_HR[at] = copies_H
    received_C = received_CR.max(1)
    away_C = load_E.sum() / R - stay_CR.min(1)
    hops_C = np.maximum(np.maximum(away_C, (rows_CR - stay_CR).max(1)), 0)
    moved_C = np.maximum(received_C, _after(np.zeros(R, np.int32), sent_HR).max(1))
    travel_C = np.maximum(costs.expert * moved_C - costs.hidden, 0)
    return Candidates(
        time_C=costs.row * rows_CR.max(1) + costs.hop * hops_C + travel_C,
        replicas_C=np.concatenate([[0], copies_H.cumsum()]),
        fits_C=received_C <= R * H if room is None else received_C <= room,
    )


def owned_rows(load_E: Floats, owner_E: Ints, ranks: int) -> Floats:
    """(R,) rows of each rank where nothing travels."""
    return np.bincount(owner_E, load_E, ranks).astype(np.float64)


def arrivals(holds_HR: Bools, node: int) -> Ints:
    """(H, R) -> (H, R): from how many ranks each rank gets an expert's tokens, itself included: ``Placement.peer_RE``'s
    rule, where tokens travel among all R."""
    H, R = holds_HR.shape
    if holds_HR.all():
        return np.ones((H, R), np.int64)
    peer_HR = _in_turn(holds_HR)
    if node and node < R:
        near_HR = _in_turn(holds_HR.reshape(-1, node)).reshape(H, R)
        first_R = np.arange(R) // node * node
        peer_HR = np.where(near_HR < 0, peer_HR, near_HR + first_R)
    peer_HR = np.where(holds_HR, np.arange(R), peer_HR)
    return np.bincount((peer_HR + np.arange(H)[:, None] * R).ravel(), minlength=H * R).reshape(H, R)


def _in_turn(holds_GR: Bools) -> Ints:
    """(G, R): the holder of its row that each place which is none of them takes, -1 = no holder; holders: any."""
    count_G1 = holds_GR.sum(1, keepdims=True)
    turn_GR = np.maximum(np.cumsum(~holds_GR, 1) - 1, 0) % np.maximum(count_G1, 1)
    holder_X = np.append(holds_GR.nonzero()[1], 0)
    first_G1 = (np.cumsum(count_G1) - count_G1[:, 0])[:, None]
    return np.where(count_G1 > 0, holder_X[first_G1 + turn_GR], -1)


def _after(start_R: NDArray, more_HR: NDArray) -> NDArray:
    return np.concatenate([start_R[None], more_HR]).cumsum(0)
