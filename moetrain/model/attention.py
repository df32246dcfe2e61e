"""Causal self-attention with grouped queries (arXiv 2305.13245), optional QK-norm and QKV bias."""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.layers import Linear, RMSNorm, rotate


class QKNorm(Enum):
    none = "none"
    head = "head"  # over each head (Qwen3)
    full = "full"  # over all heads together (OLMoE)


class Attention(nn.Module):
    def __init__(
        self, dim: int, *, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: QKNorm, qkv_bias: bool, eps: float
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.qk_norm = num_heads, num_kv_heads, head_dim, qk_norm
        self.q = Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.k = Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v = Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.out = Linear(num_heads * head_dim, dim)
        if qk_norm is not QKNorm.none:
            full = qk_norm is QKNorm.full
            self.q_norm = RMSNorm(num_heads * head_dim if full else head_dim, eps=eps)
            self.k_norm = RMSNorm(num_kv_heads * head_dim if full else head_dim, eps=eps)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], documents_BS: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D); with ``documents_BS``, a position sees its own document only."""
        q, k, v = self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
        if self.qk_norm is QKNorm.full:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm is QKNorm.head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)
        grouped = self.num_kv_heads != self.num_heads
        if documents_BS is None and q.device.type == "cpu" and q.dtype is torch.bfloat16 and not grouped:
            y: Tensor = _Causal.apply(q, k, v)  # pyright: ignore[reportAssignmentType]
        elif documents_BS is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
            causal_SS = torch.ones(same_BSS.shape[1:], dtype=torch.bool, device=q.device).tril()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=(same_BSS & causal_SS)[:, None], enable_gqa=grouped)
        return self.out(y.transpose(1, 2).flatten(2))


class _Causal(torch.autograd.Function):
    """Causal attention in bf16 on a CPU: torch's forward, and a backward of plain matmuls, which take half the time of
    its own. Scores and their softmax are made again in float32, for as many heads at once as stay small."""

    @staticmethod
    def forward(ctx, q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor) -> Tensor:
        ctx.save_for_backward(q_BHSd, k_BHSd, v_BHSd)
        return F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_BHSd: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype = g_BHSd.shape, g_BHSd.dtype
        S, scale = shape[2], shape[3] ** -0.5
        q, k, v, g = (t.flatten(0, 1) for t in (*ctx.saved_tensors, g_BHSd))
        later_SS = torch.full((S, S), -torch.inf, device=q.device).triu_(1)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        step = max(1, _SCORES // S**2)
        for start in range(0, q.shape[0], step):
            at = slice(start, start + step)
            scores = torch.baddbmm(later_SS, q[at].float(), k[at].float().transpose(1, 2), alpha=scale)
            p = scores.softmax(-1).to(dtype)
            d_v[at] = p.transpose(1, 2) @ g[at]
            d_scores = torch.ops.aten._softmax_backward_data(g[at] @ v[at].transpose(1, 2), p, -1, dtype)
            d_q[at] = (d_scores @ k[at]).mul_(scale)
            d_k[at] = (d_scores.transpose(1, 2) @ q[at]).mul_(scale)
        return d_q.view(shape), d_k.view(shape), d_v.view(shape)


_SCORES = 2**19
