"""How near a choice was to another: what two runs, that add in another order, may choose differently.

A margin is how far what a token's expert was chosen by would have to move until it is chosen, or is not any more.
"""

import torch
from torch import Tensor


def of_top_k(steering_TE: Tensor, k: int) -> Tensor:
    """(T, E) margins of the k highest of each token: to the best that is left out, or to the worst that is taken."""
    steering_TE = steering_TE.detach()
    if k >= steering_TE.shape[1]:
        return torch.full_like(steering_TE, torch.inf)
    sorted_TE = steering_TE.sort(-1, descending=True).values
    worst_T1, best_T1 = sorted_TE[:, k - 1 : k], sorted_TE[:, k : k + 1]
    return torch.where(steering_TE >= worst_T1, steering_TE - best_T1, worst_T1 - steering_TE)


def of_places(steps_BPE: Tensor, taken_BPE: Tensor, *, steps: int) -> Tensor:
    """(B, P, E) float64 margins of each expert's best tokens, by logarithms of scores in int64 ``steps`` of 1.

    Two of them that are two steps apart may be rounded to the same step: that much is no margin.
    """
    steps_BPE = steps_BPE.double()
    worst_B1E = steps_BPE.masked_fill(~taken_BPE, torch.inf).amin(1, keepdim=True)
    best_B1E = steps_BPE.masked_fill(taken_BPE, -torch.inf).amax(1, keepdim=True)
    away_BPE = torch.where(taken_BPE, steps_BPE - best_B1E, worst_B1E - steps_BPE)
    return (away_BPE - 2).clamp_min(0) / steps
