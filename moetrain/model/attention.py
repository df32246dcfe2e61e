"""Causal self-attention with grouped queries (arXiv 2305.13245), optional QK-norm and QKV bias.

``group`` (tensor parallelism) has a slice of the heads on each rank and a shard of the sequence between layers;
``context_group`` has other positions of the same sequences on each rank, dealt in zigzag.
"""

import math
from enum import Enum

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import comm, compiling
from moetrain.model import dense
from moetrain.model.attend import Visible, attend
from moetrain.model.layers import Linear, RMSNorm, rotate


class QKNorm(Enum):
    none = "none"
    head = "head"  # over each head (Qwen3)
    full = "full"  # over all heads together (OLMoE)


class Attention(nn.Module):
    group: ProcessGroup | None = None
    context_group: ProcessGroup | None = None
    ulysses: bool = False  # exchange heads against positions, rather than gather keys and values
    compiled: bool = False  # what comes before and after the attention itself

    def __init__(
        self, dim: int, *, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: QKNorm, qkv_bias: bool, eps: float
    ) -> None:
        super().__init__()
        self.head_dim, self.qk_norm, self.eps = head_dim, qk_norm, eps
        self.q = Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.k = Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v = Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.out = Linear(num_heads * head_dim, dim)
        if qk_norm is not QKNorm.none:
            full = qk_norm is QKNorm.full
            self.q_norm = RMSNorm(num_heads * head_dim if full else head_dim, eps=eps)
            self.k_norm = RMSNorm(num_kv_heads * head_dim if full else head_dim, eps=eps)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        """(B, S, D) -> (B, S, D); in a ``group``, S is gathered before and this rank's shard after.

        ``rope`` are the tables of this rank's queries, ``visible`` the keys they see.
        """
        q, k, v = self._project(x_BSD, None, rope)
        return comm.scatter_sum(self.out(self._attend(q, k, v, visible).flatten(2)), dim=1, group=self.group)

    def between(
        self, before: RMSNorm, after: RMSNorm, x_BSD: Tensor, rope: tuple[Tensor, Tensor], visible: Visible
    ) -> tuple[Tensor, Tensor]:
        """The same of the norm ``before`` it, without a ``group`` and compiled: x + what comes of it, and the norm
        ``after`` of that."""
        assert self.group is None
        y_BSHd = self._attend(*self._project(x_BSD, before, rope), visible)
        close = compiling.compiled(dense.close)
        return close(x_BSD, y_BSHd, self.out.weights, after.weight, eps=after.eps)

    def _project(
        self, x_BSD: Tensor, norm: RMSNorm | None, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the normed x; ``norm``: of what it makes of x, only compiled."""
        none, whole = self.qk_norm is QKNorm.none, self.qk_norm is QKNorm.full
        if compiling.active(self.compiled) and not (whole and self.q_norm.group is not None):
            projections, norms = (self.q.weights, self.k.weights, self.v.weights), None
            if not none:
                norms = (self.q_norm.weight, self.k_norm.weight)
            project, weight = compiling.compiled(dense.project), None if norm is None else norm.weight
            return project(x_BSD, weight, projections, norms, *rope, eps=self.eps, whole_norms=whole)
        if norm is not None:
            x_BSD = norm(x_BSD)
        q, k, v = self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
        if whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm is QKNorm.head:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rope), rotate(k, rope), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        if self.context_group is None:
            return _attend(q, k, v, visible)
        if self.ulysses:
            return _ulysses(q, k, v, visible, self.context_group)
        k, v = _all_positions(k, self.context_group), _all_positions(v, self.context_group)
        return _attend(q, k, v, visible)


def zigzag(cp: int) -> list[tuple[int, ...]]:
    """The chunks of a row, of 2 cp equal ones, that each context rank holds: an early one and a late one.

    Causal work is then the same on every rank (Llama 3, arXiv 2407.21783, section 3.3.2). A row alone is one chunk.
    """
    return [(0,)] if cp == 1 else [(rank, 2 * cp - 1 - rank) for rank in range(cp)]


def _attend(q_BSHd: Tensor, k_BPGd: Tensor, v_BPGd: Tensor, visible: Visible) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BSHd, k_BPGd, v_BPGd))
    return attend(q, k, v, visible).transpose(1, 2)


def _all_positions(x_BSGd: Tensor, group: ProcessGroup) -> Tensor:
    """(B, S, G, d) of this rank -> (B, P, G, d) of the whole row, in position order."""
    return _in_order(comm.gather(x_BSGd, dim=1, group=group), group.size())


def _ulysses(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, visible: Visible, group: ProcessGroup) -> Tensor:
    """All heads of S positions -> a slice of heads of all P, attention, and back (arXiv 2309.14509, figure 2)."""
    n, groups = group.size(), k_BSGd.shape[2]
    repeat = math.lcm(groups, n) // groups  # fewer key heads than ranks: each of them goes to several
    k, v = (t.repeat_interleave(repeat, 2) if repeat > 1 else t for t in (k_BSGd, v_BSGd))
    q, k, v = (_in_order(_heads_to_positions(t, group), n) for t in (q_BSHd, k, v))
    y_BPhd = _attend(q, k, v, visible)
    chunks = y_BPhd.chunk(2 * n, 1)
    dealt = torch.cat([chunks[i] for held in zigzag(n) for i in held], 1)
    y_nBShd = torch.stack(dealt.chunk(n, 1))
    return torch.cat(list(comm.all_to_all(y_nBShd, recv=None, send=None, group=group)), 2)


def _heads_to_positions(x_BSHd: Tensor, group: ProcessGroup) -> Tensor:
    x_nBShd = torch.stack(x_BSHd.chunk(group.size(), 2))
    return torch.cat(list(comm.all_to_all(x_nBShd, recv=None, send=None, group=group)), 1)


def _in_order(x_BP: Tensor, cp: int) -> Tensor:
    """Positions rank after rank -> positions in order."""
    chunks = x_BP.chunk(2 * cp, 1)
    dealt = [i for held in zigzag(cp) for i in held]
    return torch.cat([chunks[dealt.index(i)] for i in range(2 * cp)], 1)
