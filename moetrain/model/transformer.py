"""The decoder-only transformer: embedding, blocks (dense or MoE by pattern), final norm, head. It never knows that it
is parallel: modules hold ``group: ProcessGroup | None``, set by ``parallel/``; ``None`` means alone."""

import math
from dataclasses import field
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import comm, world
from moetrain.config import UserError, config
from moetrain.layouts import divisors
from moetrain.model.attend import Visible
from moetrain.model.attention import Attention, QKNorm
from moetrain.model.layers import Linear, RMSNorm, Rope, RopeConfig, SwiGLU
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.types import Carry, Context


@config
class ModelConfig:
    """Shapes. ``first_dense`` layers come before any MoE layer; after them every ``moe_every``-th layer is MoE."""

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
        if self.moe_every < 1:
            raise UserError(f"model.moe_every={self.moe_every}: use 1 for every layer, 2 for every second one")

    @property
    def width_of_heads(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_dense and (layer - self.first_dense) % self.moe_every == self.moe_every - 1

    @property
    def moe_layers(self) -> list[int]:
        return [i for i in range(self.num_layers) if self.is_moe(i)]

    def padded_vocab(self, multiple: int = 1) -> int:
        """Rows of the embedding in memory. The rows past ``vocab_size`` are never predicted, trained or saved."""
        step = math.lcm(self.pad_vocab_to, multiple)
        return -(-self.vocab_size // step) * step


class SharedExpert(nn.Module):
    """An expert that every token uses; with a gate, scaled by a sigmoid of the token (Qwen2-MoE, arXiv 2407.10671)."""

    def __init__(self, dim: int, *, hidden: int, gated: bool) -> None:
        super().__init__()
        self.ffn = SwiGLU(dim, hidden=hidden)
        self.gate = Linear(dim, 1) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        return y if self.gate is None else y * self.gate(x).sigmoid()


class Shared(NamedTuple):
    """What every block of a micro-batch uses, made once from its Context."""

    rope: tuple[Tensor, Tensor]  # of the positions that this rank's queries have
    visible: Visible


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), where ffn is dense, or routed experts plus a shared one."""

    def __init__(self, cfg: ModelConfig, *, layer: int) -> None:
        super().__init__()
        eps = cfg.norm_eps
        self.attention_norm, self.ffn_norm = RMSNorm(cfg.dim, eps=eps), RMSNorm(cfg.dim, eps=eps)
        self.attention = Attention(
            cfg.dim, num_heads=cfg.num_heads, num_kv_heads=cfg.num_kv_heads, head_dim=cfg.width_of_heads,
            qk_norm=cfg.qk_norm, qkv_bias=cfg.qkv_bias, eps=eps,
        )  # fmt: skip
        self.moe = MoE(cfg.moe, dim=cfg.dim, layer=layer) if cfg.is_moe(layer) else None
        self.ffn = None if self.moe else SwiGLU(cfg.dim, hidden=cfg.dense_hidden)
        shared = self.moe is not None and cfg.moe.shared_hidden > 0
        self.shared = SharedExpert(cfg.dim, hidden=cfg.moe.shared_hidden, gated=cfg.moe.shared_gate) if shared else None

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: Context, shared: Shared) -> tuple[Tensor, Carry]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), shared.rope, shared.visible)
        h_BSD = self.ffn_norm(x_BSD)
        if self.ffn is not None:
            return x_BSD + self.ffn(h_BSD), carry
        assert self.moe is not None
        y_BSD, carry = self.moe(h_BSD, carry, ctx)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(h_BSD)
        return x_BSD + y_BSD, carry


class Vocabulary(nn.Module):
    """A vector for each token id, to look up or to compare with. In a ``group``, each rank has a run of the rows.

    Rows past ``size`` pad memory: they are never looked up, predicted, trained or saved.
    """

    group: ProcessGroup | None = None

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.size = cfg.vocab_size
        self.weight = nn.Parameter(torch.empty(cfg.padded_vocab(), cfg.dim))

    @property
    def first_row(self) -> int:
        """The token id of this rank's first row."""
        return comm.rank(self.group) * self.weight.shape[0]


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
    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V); in a group, S is gathered and V is this rank's slice."""
        return score(x_BSD, self)


def score(x_BSD: Tensor, rows: Vocabulary) -> Tensor:
    """(B, S, D) -> (B, S, V) logits of this rank's rows, without those that pad."""
    real = max(0, min(rows.weight.shape[0], rows.size - rows.first_row))
    x_BSD = comm.gather(x_BSD, dim=1, group=rows.group)
    logits_BSV = F.linear(x_BSD, rows.weight[: max(real, 1)].to(x_BSD.dtype))
    return logits_BSV if real else logits_BSV.masked_fill(torch.ones_like(logits_BSV, dtype=torch.bool), -torch.inf)


class Transformer(nn.Module):
    ulysses: bool = False

    def __init__(self, cfg: ModelConfig, *, dtype: torch.dtype = torch.float32) -> None:
        """``dtype`` is what it computes in; weights keep the dtype they are given."""
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.embedding = Embedding(cfg)
        self.blocks = nn.ModuleDict({str(i): Block(cfg, layer=i) for i in range(cfg.num_layers)})
        self.norm = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else Head(cfg)
        self.rope = Rope(cfg.rope, head_dim=cfg.width_of_heads)

    def forward(self, tokens_BS: Tensor, ctx: Context) -> Tensor:
        """(B, S) int64 -> (B, S, V) logits of this rank's rows of the vocabulary; S before sequence parallelism."""
        x_BSD = self.embedding(tokens_BS, self.dtype)
        shared = self.shared(ctx, tokens_BS)
        carry: Carry = {}
        for block in self.blocks.values():
            x_BSD, carry = block(x_BSD, carry, ctx, shared)
        x_BSD = self.norm(x_BSD)
        return score(x_BSD, self.embedding) if self.head is None else self.head(x_BSD)

    def shared(self, ctx: Context, tokens_BS: Tensor) -> Shared:
        """The rotary tables and the attention plan of a micro-batch."""
        device, pieces = tokens_BS.device, ctx.pieces or ((0, tokens_BS.shape[1]),)
        cos, sin = self.rope(torch.cat([torch.arange(*piece, device=device) for piece in pieces]))
        length = ctx.length or tokens_BS.shape[1]
        seen = ((0, length),) if self.ulysses else pieces
        visible = Visible.build(pieces=seen, length=length, documents_BP=ctx.documents_BP, device=device)
        return Shared((cos.to(self.dtype), sin.to(self.dtype)), visible)

    @property
    def predicts(self) -> Vocabulary:
        """Whose rows the logits are of."""
        return self.embedding if self.head is None else self.head

    def moe_layers(self) -> list[MoE]:
        return [block.moe for block in self.blocks.values() if block.moe is not None]  # pyright: ignore


def token_losses(logits_BSV: Tensor, targets_BS: Tensor, *, rows: Vocabulary | None = None) -> Tensor:
    """(B, S, V), (B, S) -> () summed cross-entropy in float32 or wider, targets of -100 ignored; nobody divided it.

    ``rows`` says which slice of the vocabulary V is; every rank of its group returns the whole sum. None: V is all.
    """
    group, first_row = (None, 0) if rows is None else (rows.group, rows.first_row)
    logits_TV, targets_T = logits_BSV.flatten(0, 1), targets_BS.flatten()
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    if group is not None or (logits_TV.dtype != wide and world.on_cpu(logits_TV)):
        return _CrossEntropy.apply(logits_TV, targets_T, first_row, group)  # pyright: ignore[reportReturnType]
    logits_TV = logits_TV.to(wide)
    return F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy, widened a few rows at a time, on a CPU those that stay in a core's cache. The vocabulary
    may be split."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, targets_T: Tensor, first_row: int, group: ProcessGroup | None) -> Tensor:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        lse_T = logits_TV.new_empty(logits_TV.shape[0], dtype=wide)
        picked_T = torch.empty_like(lse_T)
        column_T = targets_T - first_row
        here_T = (column_T >= 0) & (column_T < logits_TV.shape[1])  # -100 is nowhere
        column_T = torch.where(here_T, column_T, 0)
        for rows in _row_blocks(logits_TV):
            block = logits_TV[rows].to(wide)
            torch.logsumexp(block, -1, out=lse_T[rows])
            picked_T[rows] = block.gather(1, column_T[rows, None])[:, 0]
        picked_T = comm.all_reduce_(torch.where(here_T, picked_T, 0), group=group)
        if group is not None:
            most_T = comm.all_reduce_(lse_T.clone(), group=group, op=dist.ReduceOp.MAX)
            lse_T = comm.all_reduce_((lse_T - most_T).exp(), group=group).log() + most_T
        counted_T = targets_T != -100
        ctx.save_for_backward(logits_TV, column_T, here_T, counted_T, lse_T)
        return torch.where(counted_T, lse_T - picked_T, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_TV, column_T, here_T, counted_T, lse_T = ctx.saved_tensors
        d_logits_TV = torch.empty_like(logits_TV)
        column_T1, g_T1 = column_T[:, None], torch.where(counted_T, g, 0)[:, None]
        hit_T1 = here_T[:, None].to(lse_T.dtype)
        for rows in _row_blocks(logits_TV):
            block = (logits_TV[rows] - lse_T[rows, None]).exp_()
            block.scatter_(1, column_T1[rows], block.gather(1, column_T1[rows]) - hit_T1[rows])
            torch.mul(block, g_T1[rows], out=block)
            d_logits_TV[rows] = block
        return d_logits_TV, None, None, None


def _row_blocks(x_TV: Tensor) -> list[slice]:
    step = max(1, (2**17 if world.on_cpu(x_TV) else 2**27) // x_TV.shape[1])
    return [slice(start, start + step) for start in range(0, x_TV.shape[0], step)]
