"""Parameters and flops of a model, counted from its shapes."""

from dataclasses import dataclass

from moetrain.model.attention import QKNorm
from moetrain.model.transformer import ModelConfig
from moetrain.moe.layer import MoEConfig


@dataclass(frozen=True)
class Size:
    """Parameter counts; active = those one token's forward uses as training ends: top-k of the routed experts, of which
    zero-computation experts take the part that an even load over all choices gives them."""

    total: int
    active: int
    matmul: int  # of the active ones, those that multiply: everything but embeddings and norms

    def __str__(self) -> str:
        return f"parameters: {_short(self.total)} total, {_short(self.active)} active"


def size(cfg: ModelConfig) -> Size:
    D, H = cfg.dim, cfg.width_of_heads
    q, kv = cfg.num_heads * H, cfg.num_kv_heads * H
    attention = D * (2 * q + 2 * kv)
    bias = q + 2 * kv if cfg.qkv_bias else 0
    norms = 2 * D + {QKNorm.none: 0, QKNorm.head: 2 * H, QKNorm.full: q + kv}[cfg.qk_norm]
    moe = cfg.moe
    expert = 3 * D * moe.hidden
    shared = (3 * D * moe.shared_hidden + D * (2 if moe.residual else moe.shared_gate)) if moe.shared_hidden else 0
    num_moe = len(cfg.moe_layers)
    num_dense = cfg.num_layers - num_moe
    moes = cfg.moe_configs
    gates, used = sum(_gate(cfg, x) for x in moes), sum(_used(x, expert) for x in moes)
    common = cfg.num_layers * attention + num_dense * 3 * D * cfg.dense_hidden + num_moe * shared + gates
    small = cfg.num_layers * (norms + bias) + D
    head = cfg.vocab_size * D
    embeddings = head if cfg.tie_embeddings else 2 * head
    matmul = common + used + head
    return Size(
        total=common + small + sum(x.num_experts for x in moes) * expert + embeddings,
        active=common + small + used + embeddings,
        matmul=matmul,
    )


def flops_per_token(cfg: ModelConfig, *, seq_len: int) -> float:
    """Forward and backward flops a token: 6 per active matmul weight, 12 q S / 2 for a layer's causal attention.

    The convention of PaLM's appendix B (arXiv 2204.02311), with the causal half of the scores, of which a window leaves
    a part; recomputation is not counted.
    """
    return 6.0 * size(cfg).matmul + 3 * sum(score_flops(cfg, i, seq_len=seq_len) for i in range(cfg.num_layers))


def score_flops(cfg: ModelConfig, layer: int, *, seq_len: int) -> float:
    """Forward flops a token of a layer's scores and of what they weigh: a query sees half of ``seq_len`` in the mean,
    in a window of w keys w - w^2 / (2 seq_len)."""
    seen = min(cfg.window(layer) or seq_len, seq_len)
    return 2 * cfg.num_heads * cfg.width_of_heads * seen * (2 * seq_len - seen) / seq_len


def layer_flops(cfg: ModelConfig) -> dict[int | str, float]:
    """Layer -> forward flops a token, and of "embedding" and "head", loss included; ``score_flops`` are not there."""
    D, H = cfg.dim, cfg.width_of_heads
    attention = 2 * D * H * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    costs: dict[int | str, float] = {i: attention + 6 * D * cfg.dense_hidden for i in range(cfg.num_layers)}
    for i, moe in zip(cfg.moe_layers, cfg.moe_configs, strict=True):
        costs[i] = attention + 2 * (_gate(cfg, moe) + _used(moe, 3 * D * moe.hidden) + 3 * D * moe.shared_hidden)
    return costs | {"embedding": D, "head": 2 * (D + 3) * cfg.vocab_size}


def _gate(cfg: ModelConfig, moe: MoEConfig) -> int:
    """Parameters of a layer's gate and constant experts, which multiply every token."""
    gate = moe.gate.num_parameters(dim=cfg.dim, num_experts=moe.num_choices)
    return gate + moe.zero_computation.num_parameters(dim=cfg.dim)


def _used(moe: MoEConfig, expert: int) -> int:
    """Of ``expert`` parameters each, those that a token meets under even load over all choices."""
    return moe.router.top_k * expert * moe.num_experts // moe.num_choices


def _short(n: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f}{unit}"
    return str(n)
