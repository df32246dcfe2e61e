"""Random numbers of tokens and experts: a function of what they are for, under every layout and at every replay."""

import torch
from torch import Tensor

from moetrain import counter, world
from moetrain.moe.types import Context

_POSITIONS = 1 << 22  # of a row, at the most: two samples then share no counter


def numbers(sample_B: Tensor, position_S: Tensor, *, device: torch.device) -> Tensor:
    """(B,), (S,) global sample ids and positions -> (T,) int64, each token's own number."""
    return (world.to_device(sample_B, device)[:, None] * _POSITIONS + position_S.to(device)).flatten()


def uniform(ctx: Context, *key: int | str, num_experts: int, device: torch.device) -> Tensor:
    """(T, E) float64 in (0, 1), a hash of (run's seed, ``key``, global sample, position, expert)."""
    token_T = numbers(ctx.sample_B, ctx.position_S, device=device)
    index_TE = token_T[:, None] * num_experts + torch.arange(num_experts, device=device)
    return counter.uniform(index_TE, key=counter.key(ctx.seed, *key))
