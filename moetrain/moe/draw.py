"""Random numbers of tokens and experts: a function of what they are for, under every layout and at every replay."""

import torch
from torch import Tensor

from moetrain import counter
from moetrain.moe.types import Context

_POSITIONS = 1 << 22  # of a row, at the most: two samples then share no counter


def uniform(ctx: Context, *key: int | str, num_experts: int, device: torch.device) -> Tensor:
    """(T, E) float64 in (0, 1), a hash of (run's seed, ``key``, global sample, position, expert)."""
    sample_B, position_S = ctx.sample_B.to(device), ctx.position_S.to(device)
    token_T1 = (sample_B[:, None] * _POSITIONS + position_S).view(-1, 1)
    index_TE = token_T1 * num_experts + torch.arange(num_experts, device=device)
    return counter.uniform(index_TE, key=counter.key(ctx.seed, *key))
