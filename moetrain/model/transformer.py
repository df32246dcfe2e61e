"""The decoder-only transformer: embedding, blocks (dense or MoE by pattern), final norm, head. It never knows that it
is parallel: modules hold ``group: ProcessGroup | None``, set by ``parallel/``; ``None`` means alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import comm, compiling, deferred, world
from moetrain.config import UserError, config
from moetrain.layouts import divisors
from moetrain.model.attend import Visible
from moetrain.model.attention import Attention, QKNorm
from moetrain.model.layers import Linear, RMSNorm, Rope, RopeConfig, SwiGLU
from moetrain.model.loss import summed, summed_in_chunks, summed_of_head
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.types import Carry, Context
from moetrain.rerun import remake, rerun
from moetrain.where import here


@config
class ModelConfig:
    """Shapes. ``first_dense`` layers come before any MoE layer; after them every ``moe_every``-th layer is MoE.

    ``windows``: keys that a query sees, its own included, 0 = all; layer after layer, over and over.
    """

    vocab_size: int = 4096
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int | None = None
    qk_norm: QKNorm = QKNorm.none
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    windows: list[int] = field(default_factory=list)
    tie_embeddings: bool = False
    first_dense: int = 0
    moe_every: int = 1
    dense_hidden: int = 1024
    moe: MoEConfig = field(default_factory=MoEConfig)
    init_std: float = 0.02
    depth_scaled_init: bool = True
    pad_vocab_to: int = 64

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}: "
                f"use one of {divisors(self.num_heads)}"
            )
        if self.head_dim is None and self.dim % self.num_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} does not divide model.dim={self.dim}: use one of "
                f"{divisors(self.dim)} or set model.head_dim"
            )
        if self.width_of_heads % 2:
            raise UserError(
                f"model.head_dim={self.width_of_heads} is odd: rotary positions pair dimensions, use an even one"
            )
        if any(window < 0 for window in self.windows):
            raise UserError(f"model.windows={self.windows}: use numbers of keys that a query sees, 0 for all")
        if len(self.windows) > self.num_layers:
            raise UserError(
                f"model.windows={self.windows} has {len(self.windows)} numbers for model.num_layers={self.num_layers}: "
                f"give at most one a layer, they repeat"
            )
        if self.moe_every < 1:
            raise UserError(f"model.moe_every={self.moe_every}: use 1 for every layer, 2 for every second one")
        moe = self.moe
        moe.per_layer.check(
            num_layers=len(self.moe_layers), num_experts=moe.num_experts, top_k=moe.router.top_k,
            extra=moe.zero_computation.total,
        )  # fmt: skip

    @property
    def width_of_heads(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    def window(self, layer: int) -> int:
        """Keys that a query of this layer sees; 0: all."""
        return self.windows[layer % len(self.windows)] if self.windows else 0

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_dense and (layer - self.first_dense) % self.moe_every == self.moe_every - 1

    @property
    def moe_layers(self) -> list[int]:
        return [i for i in range(self.num_layers) if self.is_moe(i)]

    @property
    def moe_configs(self) -> list[MoEConfig]:
        """That of each MoE layer."""
        return [self.moe.at(i) for i in range(len(self.moe_layers))]

    def padded_vocab(self, multiple: int = 1) -> int:
        """Rows of the embedding in memory. The rows past ``vocab_size`` are never predicted, trained or saved."""
        step = math.lcm(self.pad_vocab_to, multiple)
        return -(-self.vocab_size // step) * step


class SharedExpert(nn.Module):
    """An expert that every token uses, beside the routed ones.

    With a gate, scaled by a sigmoid of the token (Qwen2-MoE, arXiv 2407.10671); in residual MoE, it and the routed ones
    are weighed by a softmax of the token (PR-MoE, arXiv 2201.05596, section 4.1.2).
    """

    def __init__(self, dim: int, cfg: MoEConfig) -> None:
        super().__init__()
        self.ffn, self.residual = SwiGLU(dim, hidden=cfg.shared_hidden), cfg.residual
        self.gate = Linear(dim, 2 if cfg.residual else 1) if cfg.residual or cfg.shared_gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) tokens -> (B, S, D) of this expert, and (B, S, 1) what the routed ones weigh, None = 1."""
        y = self.ffn(comm.gather(x, dim=1, group=self.ffn.group))
        if self.gate is None:
            return y, None
        if not self.residual:
            return y * self.gate(x).sigmoid(), None
        weights = self.gate(x).softmax(-1)
        return y * weights[..., :1], weights[..., 1:]

    @staticmethod
    def join(routed: Tensor, own: Tensor, weight: Tensor | None) -> Tensor:
        """What the routed experts made of them, and the two of ``forward`` -> (B, S, D) of all."""
        return (routed if weight is None else routed * weight) + own


class Shared(NamedTuple):
    """What every block of a micro-batch uses, made once from its Context."""

    rope: tuple[Tensor, Tensor]  # of the positions that this rank's queries have
    visible: dict[int, Visible]  # of each window that a layer here has


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), where ffn is dense, or routed experts plus a shared one.

    What backward computes again, rather than keep it, is off by default; ``parallel/recompute.py`` sets it.
    """

    rerun_all: bool = False
    remake_norms: bool = False
    rerun_attention: bool = False
    rerun_moe: bool = False
    compiled: bool = False

    def __init__(self, cfg: ModelConfig, *, layer: int) -> None:
        super().__init__()
        eps, self.window = cfg.norm_eps, cfg.window(layer)
        self.attention_norm, self.ffn_norm = RMSNorm(cfg.dim, eps=eps), RMSNorm(cfg.dim, eps=eps)
        self.attention = Attention(
            cfg.dim, num_heads=cfg.num_heads, num_kv_heads=cfg.num_kv_heads, head_dim=cfg.width_of_heads,
            qk_norm=cfg.qk_norm, qkv_bias=cfg.qkv_bias, eps=eps,
        )  # fmt: skip
        self.moe = None
        if cfg.is_moe(layer):
            self.moe = MoE(cfg.moe.at(cfg.moe_layers.index(layer)), dim=cfg.dim, layer=layer)
        self.ffn = None if self.moe else SwiGLU(cfg.dim, hidden=cfg.dense_hidden)
        self.shared = SharedExpert(cfg.dim, cfg.moe) if self.moe is not None and cfg.moe.shared_hidden else None

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: Context, shared: Shared) -> tuple[Tensor, Carry]:
        if self.rerun_all:
            ctx = ctx.for_rerun()
        return rerun(self._layer, x_BSD, carry, ctx, shared, on=self.rerun_all)

    def _layer(self, x_BSD: Tensor, carry: Carry, ctx: Context, shared: Shared) -> tuple[Tensor, Carry]:
        if self.moe is not None:
            self.moe.experts.prefetch()
        seen = {"rope": shared.rope, "visible": shared.visible[self.window]}
        attention = partial(self.attention, **seen)
        group, again = self.attention.group, self.rerun_attention
        h_BSD = None
        if compiling.active(self.compiled) and group is None and not (again or self.remake_norms):
            norms = self.attention_norm, self.ffn_norm
            x_BSD, h_BSD = self.attention.between(*norms, x_BSD, **seen)
        else:
            x_BSD = x_BSD + self._normed(self.attention_norm, attention, x_BSD, group=group, again=again)
        if self.ffn is not None:
            return x_BSD + self._normed(self.ffn_norm, self.ffn, x_BSD, group=self.ffn.group, normed=h_BSD), carry
        routed = partial(self._routed, carry=carry, ctx=ctx.for_rerun() if self.rerun_moe else ctx)
        y_BSD, carry = self._normed(self.ffn_norm, routed, x_BSD, again=self.rerun_moe, normed=h_BSD)
        return x_BSD + y_BSD, carry

    def _routed(self, h_BSD: Tensor, carry: Carry, ctx: Context) -> tuple[Tensor, Carry]:
        assert self.moe is not None
        if (shared := self.shared) is None:
            return self.moe(h_BSD, carry, ctx)
        found = []
        y_BSD, carry = self.moe(h_BSD, carry, ctx, beside=lambda: found.extend(shared(h_BSD)))
        return shared.join(y_BSD, *found), carry

    def _normed(
        self, norm: RMSNorm, use: Callable, x_BSD: Tensor, *, group: ProcessGroup | None = None, again: bool = False,
        normed: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """``use`` of the normed x, S gathered over the group; whether ``use`` is computed ``again`` in backward.
        ``normed``: that is there already, without a group."""
        if normed is not None:
            return rerun(use, normed, on=again)
        whole = partial(comm.gather, dim=1, group=group)
        if again and not self.remake_norms:
            return rerun(lambda h: use(whole(h)), norm(x_BSD))
        if again:
            return rerun(lambda x: use(whole(norm(x))), x_BSD)
        return remake(lambda x: whole(norm(x)), use, x_BSD) if self.remake_norms else use(whole(norm(x_BSD)))


class Vocabulary(nn.Module):
    """A vector for each token id, to look up or to compare with. In a ``group``, each rank has a run of the rows.

    Rows past ``size`` pad memory: they are never looked up, predicted, trained or saved.
    """

    group: ProcessGroup | None = None
    loss_rows: int = 0  # tokens whose logits are held at a time for a loss; 0 = all
    compiled: bool = False  # the loss of whole logits, on a GPU

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.size = cfg.vocab_size
        self.weight = nn.Parameter(torch.empty(cfg.padded_vocab(), cfg.dim))

    @property
    def first_row(self) -> int:
        """The token id of this rank's first row."""
        return comm.rank(self.group) * self.weight.shape[0]

    @property
    def real_rows(self) -> int:
        """How many of this rank's rows are not padding."""
        return max(0, min(self.weight.shape[0], self.size - self.first_row))


class Embedding(Vocabulary):
    def forward(self, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, S) -> (B, S, D); in a group, this rank's shard of S: each rank looks up the rows it has."""
        weight = self.weight
        if world.on_cpu(weight):  # whose backward adds up a row's gradients in the dtype of the table
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.group is None:
            return F.embedding(tokens_BS, weight).to(dtype)
        row_BS = tokens_BS - self.first_row
        here_BS = (row_BS >= 0) & (row_BS < weight.shape[0])
        x_BSD = F.embedding(torch.where(here_BS, row_BS, 0), weight).to(dtype)
        return comm.scatter_sum(torch.where(here_BS[..., None], x_BSD, 0), dim=1, group=self.group)


class Head(Vocabulary):
    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """See ``predict``. The loss is made here: a weight stored in shards is gathered for calls of its module."""
        return predict(x_BSD, self, targets_BS)


def predict(x_BSD: Tensor, rows: Vocabulary, targets_BS: Tensor | None) -> Tensor:
    """(B, S, D) -> (B, S, V) logits; given targets, their () summed loss, in chunks of ``rows.loss_rows`` tokens."""
    if targets_BS is None:
        return score(x_BSD, rows)
    if rows.loss_rows == 0:
        wide = x_BSD.dtype in (torch.float32, torch.float64)
        if wide and rows.group is None and world.on_cpu(x_BSD) and torch.is_grad_enabled() and not deferred.recording():
            return summed_of_head(x_BSD, real(rows, rows.size).to(x_BSD.dtype), targets_BS)
        logits_BSV = score(x_BSD, rows)
        return summed(logits_BSV, targets_BS, first_row=rows.first_row, group=rows.group, compiled=rows.compiled)
    x_BSD = comm.gather(x_BSD, dim=1, group=rows.group)
    return summed_in_chunks(
        x_BSD, rows.weight, targets_BS, real_rows=rows.real_rows, first_row=rows.first_row, group=rows.group,
        step=rows.loss_rows,
    )  # fmt: skip


def score(x_BSD: Tensor, rows: Vocabulary) -> Tensor:
    """(B, S, D) -> (B, S, V) logits of this rank's rows, without those that pad; in a group, S is gathered."""
    some = rows.real_rows
    x_BSD = comm.gather(x_BSD, dim=1, group=rows.group)
    logits_BSV = deferred.linear(x_BSD, real(rows, max(some, 1)).to(x_BSD.dtype))
    return logits_BSV if some else logits_BSV.masked_fill(torch.ones_like(logits_BSV, dtype=torch.bool), -torch.inf)


def real(rows: Vocabulary, count: int) -> Tensor:
    """(count, D) the first rows. Even a slice of all has its gradient copied into zeros: none is made of them."""
    return rows.weight if count == rows.weight.shape[0] else rows.weight[:count]


@dataclass(frozen=True)
class Stage:
    """A run of consecutive layers; the ``first`` one begins with the embedding, the ``last`` ends with the head."""

    layers: range
    first: bool = True
    last: bool = True


class Transformer(nn.Module):
    """What a rank has of the model: the whole, or its ``stages`` of a pipeline. Names are those of the whole."""

    ulysses: bool = False

    def __init__(
        self, cfg: ModelConfig, *, dtype: torch.dtype = torch.float32, stages: tuple[Stage, ...] | None = None
    ) -> None:
        """``dtype`` is what it computes in; weights keep the dtype they are given."""
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.stages = stages or (Stage(range(cfg.num_layers)),)
        first, last = (any(getattr(stage, end) for stage in self.stages) for end in ("first", "last"))
        self.embedding = Embedding(cfg) if first or (last and cfg.tie_embeddings) else None
        layers = sorted(i for stage in self.stages for i in stage.layers)
        self.blocks = nn.ModuleDict({str(i): Block(cfg, layer=i) for i in layers})
        self.norm = RMSNorm(cfg.dim, eps=cfg.norm_eps) if last else None
        self.head = Head(cfg) if last and not cfg.tie_embeddings else None
        self.rope = Rope(cfg.rope, head_dim=cfg.width_of_heads)

    def forward(
        self, x: Tensor, ctx: Context, targets_BS: Tensor | None = None, *, carry: Carry | None = None,
        stage: Stage | None = None,
    ) -> Tensor | tuple[Tensor, Carry]:  # fmt: skip
        """(B, S) int64 -> (B, S, V) logits of this rank's rows of the vocabulary; S before sequence parallelism.

        Given targets, their () summed loss instead. By default all is one ``stage``; one that is not the first takes
        the (B, S, D) shard and the carry of the one before, one that is not the last returns them.
        """
        stage = stage or self.stages[0]
        passed: Carry = carry or {}
        shared = self.shared(ctx, x)
        if stage.first:
            assert self.embedding is not None
            x = self.embedding(x, self.dtype)
        for i in stage.layers:
            here.layer = i
            x, passed = self.blocks[str(i)](x, passed, ctx, shared)
        here.layer = None
        if not stage.last:
            return x, passed
        assert self.norm is not None
        x = self.norm(x)
        if self.head is not None:
            return self.head(x, targets_BS)
        assert self.embedding is not None
        return predict(x, self.embedding, targets_BS)

    def shared(self, ctx: Context, x: Tensor) -> Shared:
        """The rotary tables and the attention plans of a micro-batch, whose tokens or shard of activations ``x`` is."""
        device, pieces = x.device, ctx.pieces or ((0, x.shape[1]),)
        cos, sin = self.rope(torch.cat([torch.arange(*piece, device=device) for piece in pieces]))
        length = ctx.length or x.shape[1]
        seen = ((0, length),) if self.ulysses else pieces
        build = partial(
            Visible.build, pieces=seen, length=length, documents_BP=ctx.documents_BP, device=device, rows=x.shape[0]
        )
        visible = {window: build(window=window) for window in {self.cfg.window(int(i)) for i in self.blocks}}
        return Shared((cos.to(self.dtype), sin.to(self.dtype)), visible)

    def moe_layers(self) -> list[MoE]:
        return [block.moe for block in self.blocks.values() if block.moe is not None]  # pyright: ignore
