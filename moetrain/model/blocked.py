"""Exact attention by blocks of queries, in plain torch operations: any device and dtype, memory linear in the length.

B rows, H query heads in G groups of R = H / G that share a key head, d wide; S queries of this rank, P keys of a whole
row; r queries and n keys of a block, C (row, key head) pairs of it at once, Q = R * r queries of each.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import world

_QUERIES = 128  # of a block: more compute scores that nobody sees, fewer make small matmuls
_SCORES = 2**19  # made at once: what a core's cache holds
_MANY_SCORES = 2**26  # what fills a GPU


class Block(NamedTuple):
    """Queries computed together, and all the keys that any of them sees; half-open ranges."""

    row: int | None  # None: every row
    queries: tuple[int, int]  # of this rank's S
    keys: tuple[int, int]  # positions; the last one is the last query's own

    @property
    def scores(self) -> int:
        """How many a head computes in a row."""
        return (self.queries[1] - self.queries[0]) * (self.keys[1] - self.keys[0])


def split(pieces: Sequence[tuple[int, int]], start_BS: Tensor | None, *, size: int = _QUERIES) -> tuple[Block, ...]:
    """Pieces of queries -> blocks of at most ``size``. ``start_BS`` (int64, on the host): the first key of each query,
    which never falls along a piece; several rows have blocks of their own, since their keys begin elsewhere."""
    blocks, base = [], 0
    for begin, end in pieces:
        for first in range(begin, end, size):
            last = min(first + size, end)
            queries = (base + first - begin, base + last - begin)
            if start_BS is None:
                blocks.append(Block(None, queries, (0, last)))
            else:
                starts, alike = start_BS[:, queries[0]].tolist(), len(start_BS) == 1
                blocks += [Block(None if alike else b, queries, (at, last)) for b, at in enumerate(starts)]
        base += end - begin
    return tuple(blocks)


class Blocked(torch.autograd.Function):
    """Attention over ``blocks``. A block sees its keys all at once, so that its softmax merges with no other's, and the
    backward makes it again (FlashAttention, arXiv 2205.14135, section 3.1): only q, k and v are saved. Scores and their
    softmax are float32 or wider. ``fused``: the forward is torch's own, of whole rows without documents."""

    @staticmethod
    def forward(
        ctx,
        q_BHSd: Tensor,
        k_BGPd: Tensor,
        v_BGPd: Tensor,
        start_BS: Tensor | None,
        blocks: Sequence[Block],
        fused: bool,
    ) -> Tensor:
        ctx.save_for_backward(q_BHSd, k_BGPd, v_BGPd)
        ctx.start_BS, ctx.blocks = start_BS, blocks
        (B, H, S, d), G = q_BHSd.shape, k_BGPd.shape[1]
        if fused:
            return F.scaled_dot_product_attention(q_BHSd, k_BGPd, v_BGPd, is_causal=True, enable_gqa=G != H)
        y_BHSd = q_BHSd.new_empty(B, S, H, d).transpose(1, 2)  # laid out as the output projection reads it
        y_BGRSd = y_BHSd.unflatten(1, (G, -1))
        for at in _softmaxes(q_BHSd, k_BGPd, start_BS, blocks):
            to_y = y_BGRSd[at.queries]
            to_y.copy_((at.p_CQn @ v_BGPd[at.keys].flatten(0, 1)).view(to_y.shape))
        return y_BHSd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_BHSd: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHSd, k_BGPd, v_BGPd, g_BHSd = (t.contiguous() for t in (*ctx.saved_tensors, g_BHSd))
        dtype, scale, (_, G, P, _) = q_BHSd.dtype, q_BHSd.shape[-1] ** -0.5, k_BGPd.shape
        once = len(ctx.blocks) == 1 and ctx.blocks[0].keys == (0, P)  # else what several blocks give a key is added up
        wide = dtype if once else torch.promote_types(dtype, torch.float32)
        d_q, d_k, d_v = torch.empty_like(q_BHSd), *(torch.zeros_like(t, dtype=wide) for t in (k_BGPd, v_BGPd))
        put = Tensor.copy_ if once else Tensor.add_
        g_BGRSd, d_q_BGRSd = (t.unflatten(1, (G, -1)) for t in (g_BHSd, d_q))
        for at in _softmaxes(q_BHSd, k_BGPd, ctx.start_BS, ctx.blocks):
            g_CQd, v_Cnd = g_BGRSd[at.queries].flatten(0, 1).flatten(1, 2), v_BGPd[at.keys].flatten(0, 1)
            to_q, to_k, to_v = d_q_BGRSd[at.queries], d_k[at.keys], d_v[at.keys]
            put(to_v, (at.p_CQn.transpose(1, 2) @ g_CQd).view(to_v.shape))
            d_scores = torch.ops.aten._softmax_backward_data(g_CQd @ v_Cnd.transpose(1, 2), at.p_CQn, -1, dtype)
            to_q.copy_((d_scores @ at.k_Cnd).view(to_q.shape))
            put(to_k, (d_scores.transpose(1, 2) @ at.q_CQd).view(to_k.shape))
        return d_q.mul_(scale), d_k.mul_(scale).to(dtype), d_v.to(dtype), None, None, None


class _Softmax(NamedTuple):
    """Of some rows and key heads of a block."""

    queries: tuple[slice, ...]  # into (B, G, R, S)
    keys: tuple[slice, ...]  # into (B, G, P)
    q_CQd: Tensor
    k_Cnd: Tensor
    p_CQn: Tensor  # in q's dtype


def _softmaxes(q_BHSd: Tensor, k_BGPd: Tensor, start_BS: Tensor | None, blocks: Sequence[Block]) -> Iterator[_Softmax]:
    """Block by block, and of a block as many rows and key heads at a time as keep the scores few."""
    (B, H, _, d), G, dtype = q_BHSd.shape, k_BGPd.shape[1], q_BHSd.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q_BGRSd = q_BHSd.unflatten(1, (G, -1))
    for block in blocks:
        hidden_Qn = _hidden(block, start_BS, q_BHSd.device, wide).repeat(H // G, 1)
        pairs = max(1, (_SCORES if world.on_cpu(q_BHSd) else _MANY_SCORES) // hidden_Qn.numel())
        step_B = max(1, pairs // G)  # several rows only with all their key heads
        first, last = (0, B) if block.row is None else (block.row, block.row + 1)
        for b, g in itertools.product(range(first, last, step_B), range(0, G, pairs)):
            some = slice(b, min(b + step_B, last)), slice(g, g + pairs)
            queries, keys = (*some, slice(None), slice(*block.queries)), (*some, slice(*block.keys))
            q_CQd, k_Cnd = q_BGRSd[queries].flatten(0, 1).flatten(1, 2), k_BGPd[keys].flatten(0, 1)
            scores = torch.baddbmm(hidden_Qn, q_CQd.to(wide), k_Cnd.to(wide).transpose(1, 2), alpha=d**-0.5)
            yield _Softmax(queries, keys, q_CQd, k_Cnd, scores.softmax(-1).to(dtype))


def _hidden(block: Block, start_BS: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(r, n): 0 where a query sees a key, -inf where the key is later or before the query's first."""
    r, n = block.queries[1] - block.queries[0], block.keys[1] - block.keys[0]
    hidden_rn = torch.full((r, n), -torch.inf, dtype=dtype, device=device).triu_(n - r + 1)
    if start_BS is None:
        return hidden_rn
    start_r = start_BS[block.row or 0, slice(*block.queries)]
    return hidden_rn.masked_fill_(torch.arange(*block.keys, device=device) < start_r[:, None], -torch.inf)
