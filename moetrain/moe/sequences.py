"""Whole sequences, for what looks at more than one token: gathered over the ranks that hold their other positions.

Every rank of the group then computes the same from the same numbers, and keeps what belongs to its own tokens.
Letters: P positions of a whole row, X columns.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.moe.types import Context

STEPS = 1 << 16
_FAR = 2.0**40  # steps: what a score of zero is put at


def whole(x_TX: Tensor, *, ctx: Context, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(T, X) -> (B, P, X) in order of position, and (B, P) bool, False = padding. No gradient; one all-gather."""
    B = len(ctx.sample_B)
    x_BSX = x_TX.detach().view(B, -1, x_TX.shape[1])
    real_BS = x_BSX.new_ones(x_BSX.shape[:2], dtype=torch.bool) if ctx.mask_BS is None else ctx.mask_BS
    if group is None:
        return x_BSX, real_BS
    position_BS1 = ctx.position_S.to(x_TX.device).expand(B, -1)[:, :, None]
    columns = torch.cat([x_BSX, position_BS1.to(x_TX.dtype), real_BS[:, :, None].to(x_TX.dtype)], 2)
    table_BPX = comm.all_gather(columns, group=group).transpose(0, 1).flatten(1, 2)
    table_BPX = table_BPX[:, table_BPX[0, :, -2].argsort()]
    return table_BPX[:, :, :-2].contiguous(), table_BPX[:, :, -1] > 0


def mine(x_BPX: Tensor, *, ctx: Context, group: ProcessGroup | None) -> Tensor:
    """(B, P, X) -> (T, X): this rank's tokens of whole sequences."""
    return (x_BPX if group is None else x_BPX[:, ctx.position_S.to(x_BPX.device)]).flatten(0, 1)


def steps(scores_BPE: Tensor) -> Tensor:
    """int64: a score's logarithm in steps of 2^-16. What falls into one is a tie: twins, as the equal first tokens of
    two documents, score alike but for rounding, which is another under every layout."""
    return (scores_BPE.log() * STEPS).round().clamp(-_FAR, _FAR).long()


def places(keys_BPE: Tensor) -> Tensor:
    """(B, P, E) -> int64: each token's place in its column, the highest key first, of equal ones the earlier token."""
    order_BPE = keys_BPE.sort(dim=1, descending=True, stable=True).indices
    rank_BPE = torch.arange(order_BPE.shape[1], device=order_BPE.device)[None, :, None].expand_as(order_BPE)
    return torch.empty_like(order_BPE).scatter_(1, order_BPE, rank_BPE)
