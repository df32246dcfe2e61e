"""What a placement costs: the modelled time of one MoE layer in a step; for planners, of candidates.

    time = row * max_r rows_r + hop * max_r max(away_r, arrived_r)
           + max(0, expert * max_r max(sent_r, received_r) - hidden)

Where ranks share processors, each max_r is at least ``shared`` times the mean over ranks: who waits leaves its turn.
rows_r: assignments that rank r computes; away_r and arrived_r: those that it sends to, and gets from, other ranks;
sent_r and received_r: experts likewise, each copy counted. Every rank routes load_e / R assignments to expert e. Other
letters: C candidates; H experts that may travel, in the order in which they are taken; X holders of those; N nodes,
F (expert, node) pairs without a holder.
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
    mean, turns = float(rows_R.mean()), costs.shared / R
    moved, away = max(sent, received, turns * int(moved_RE.sum())), float(share_RE.sum() - stay_R.sum())
    return Modelled(
        rows=rows, mean_rows=mean, hops=hops, sent=sent, received=received,
        compute_us=costs.row * max(rows, costs.shared * mean), hop_us=costs.hop * max(hops, turns * away),
        travel_us=max(0.0, costs.expert * moved - costs.hidden),
    )  # fmt: skip


@dataclass(frozen=True)
class Prefixes:
    """The first c of a list of experts on every rank, the others at their owners: c = 0 .. H."""

    time_C: Floats
    received_C: Ints  # replicas of the rank that has the most


def everywhere(order_H: Ints, load_E: Floats, owner_E: Ints, costs: Costs, ranks: int) -> Prefixes:
    """What each prefix of a list of experts costs that every rank holds. From one to the next one rank's own rows fall:
    the most are the most of those yet to fall and of what remains. No rank sends more than the busiest one gets."""
    H, R = len(order_H), ranks
    own = owned(load_E, owner_E, R).tolist()
    hot, with_count = [0] * R, [R, *[0] * H]  # experts of the list that a rank owns; ranks that own so many
    before_C, sent_C, received_C = [0.0] * (H + 1), [0], [0]
    for c, (home, load) in enumerate(zip(owner_E[order_H].tolist(), load_E[order_H].tolist(), strict=True)):
        before_C[c] = own[home]
        own[home] -= load
        with_count[hot[home]] -= 1
        hot[home] += 1
        with_count[hot[home]] += 1
        sent_C.append(max(sent_C[-1], (R - 1) * hot[home]))
        fewest = c - received_C[-1]
        received_C.append(c + 1 - fewest - (with_count[fewest] == 0))
    before_C[H] = max(own)
    most_C = np.maximum.accumulate(np.array(before_C)[::-1])[::-1]
    hot_C, total, turns = np.append(0, load_E[order_H]).cumsum(), float(load_E.sum()), costs.shared / R
    hops_C = (R - 1) / R * np.maximum(np.maximum(most_C, turns * (total - hot_C)), 0)
    moved_C = np.maximum(np.maximum(received_C, sent_C), turns * (R - 1) * np.arange(H + 1))
    travel_C = np.maximum(costs.expert * moved_C - costs.hidden, 0)
    rows_C = np.maximum(most_C + hot_C / R, turns * total)
    return Prefixes(costs.row * rows_C + costs.hop * hops_C + travel_C, np.array(received_C))


def replicated(
    order_H: Ints, holds_HR: Bools, load_E: Floats, owner_E: Ints, costs: Costs, node: int
) -> tuple[float, int]:
    """The time where some experts are held as ``holds_HR`` says, the others by their owners; and how many replicas.

    Of ``Placement.peer_RE`` it needs no more than how often a holder comes up, which is counted, not listed.
    """
    (H, R), owner_H, share_H = holds_HR.shape, owner_E[order_H], load_E[order_H] / holds_HR.shape[1]
    expert_X, rank_X = holds_HR.nonzero()
    at_home_R = owned(load_E, owner_E, R) - owned(load_E[order_H], owner_H, R)
    rows_R = at_home_R + np.bincount(rank_X, share_H[expert_X] * arrivals(expert_X, rank_X, H, R, node), R)
    stay_R = at_home_R / R + np.bincount(rank_X, share_H[expert_X], R)
    hops = max(float((load_E.sum() / R - stay_R).max()), float((rows_R - stay_R).max()), 0.0)
    received_R = np.bincount(rank_X, minlength=R) - np.bincount(owner_H, minlength=R)
    sent_R = np.bincount(owner_H, np.bincount(expert_X, minlength=H) - 1, R)
    total, copies, turns = float(load_E.sum()), len(rank_X) - H, costs.shared / R
    rows, hops = max(float(rows_R.max()), turns * total), max(hops, turns * (total - float(stay_R.sum())))
    travel = costs.expert * max(int(received_R.max()), int(sent_R.max()), turns * copies) - costs.hidden
    return costs.row * rows + costs.hop * hops + max(0.0, travel), copies


def arrivals(expert_X: Ints, rank_X: Ints, H: int, R: int, node: int) -> Ints:
    """(X,) for each holder, by expert and rank: from how many ranks it gets tokens, itself included.

    Holder i of the j in a node gets those of (node - 1 - i) // j others there. A node without one comes up with its
    ranks in a row: ``node`` turns among all c holders, which start at the number of ranks before it that hold none.
    """
    node = min(node or R, R)
    N, node_X = R // node, rank_X // node
    held_HN = np.bincount(expert_X * N + node_X, minlength=H * N).reshape(H, N)
    before_HN = held_HN.cumsum(1) - held_HN
    count_H = held_HN.sum(1)
    first_H = count_H.cumsum() - count_H
    place_X = np.arange(len(rank_X)) - first_H[expert_X] - before_HN[expert_X, node_X]
    near_X = (node - 1 - place_X) // held_HN[expert_X, node_X]
    if held_HN.all():
        return 1 + near_X

    expert_F, node_F = (held_HN == 0).nonzero()
    count_F, first_F = count_H[expert_F], first_H[expert_F]
    rounds_H = np.bincount(expert_F, node // count_F, H).astype(np.int64)
    start_F = (node_F * node - before_HN[expert_F, node_F]) % count_F
    end_F = start_F + node % count_F
    over_F = np.maximum(end_F - count_F, 0)
    begins = np.bincount(np.concatenate([first_F + start_F, first_F]), minlength=len(rank_X) + 1)
    ends = np.bincount(np.concatenate([first_F + end_F - over_F, first_F + over_F]), minlength=len(rank_X) + 1)
    return 1 + near_X + rounds_H[expert_X] + (begins - ends).cumsum()[:-1]


def owned(load_E: Floats, owner_E: Ints, ranks: int) -> Floats:
    """(R,) rows of the experts that each rank owns."""
    return np.bincount(owner_E, load_E, ranks).astype(np.float64)
