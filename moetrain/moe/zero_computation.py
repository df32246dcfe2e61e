"""Choices that cost next to nothing: zero, copy and constant experts (MoE++, arXiv 2410.07348), null experts (AdaMoE,
arXiv 2406.13233). Every rank has all of them, and no token is sent to one.

A gate has C = E + Z columns: its E experts, which are placed and sharded, then these, kind after kind:

    zero       0
    copy       x
    constant   a_1 x + a_2 v,  [a_1, a_2] = softmax(W x),  v and W its own
    null       0, and the token's other choices share what it would have weighed

Letters: C choices, the E experts included   P constant experts (their parameters)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config import UserError, config

KINDS = ("zero", "copy", "constant", "nulls")
"""In the order of their ids."""


@config
class ZeroComputationConfig:
    """How many of each kind a layer has. ``weight`` is MoE++'s tau: what a zero, copy or constant expert counts in a
    balance loss, where an expert or a null counts 1, so that even load gives it 1 / ``weight`` of an expert's share.

    1 treats it as one more expert; MoE++ has 0.75, by which experts get less.
    """

    zero: int = 0
    copy: int = 0
    constant: int = 0
    nulls: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        for kind in KINDS:
            if (value := getattr(self, kind)) < 0:
                raise UserError(f"model.moe.zero_computation.{kind}={value}: a number of experts, use 0 for none")
        if not 0 < self.weight < math.inf:
            raise UserError(
                f"model.moe.zero_computation.weight={self.weight}: has to be above 0 and finite (1: like an expert)"
            )

    @property
    def total(self) -> int:
        """Z of a layer."""
        return self.zero + self.copy + self.constant + self.nulls

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind in KINDS if (count := getattr(self, kind)))

    def num_parameters(self, *, dim: int) -> int:
        """Of one layer."""
        return 3 * dim * self.constant

    def even_parts(self, num_experts: int) -> float:
        """Into how many parts assignments fall under even load, of which an expert gets one.

        MoE++'s (tau N_F + N_Z) / tau: its FFN capacity is factor * T * K by this. Zero-computation experts have no
        capacity, where the paper gives them factor * T * K / (tau N_F + N_Z): what stays in place needs no buffer.
        """
        return num_experts + self.nulls + (self.total - self.nulls) / self.weight

    def weighted(self, P_TC: Tensor) -> Tensor:
        """(T, C) scores, those of zero, copy and constant experts times ``weight`` (MoE++: eta_i of eta_i f_i P_i)."""
        if self.weight == 1.0:
            return P_TC
        E, weighted = P_TC.shape[1] - self.total, self.total - self.nulls
        experts_TE, weighted_TX, null_TX = P_TC.split([E, weighted, self.nulls], 1)
        return torch.cat([experts_TE, self.weight * weighted_TX, null_TX], 1)

    def levelled(self, load_XC: Tensor) -> Tensor:
        """(..., C) float loads, each null expert's the mean of all of them (AdaMoE: it matters not which one it is)."""
        if self.nulls < 2:
            return load_XC
        rest_XC, null_XC = load_XC.split([load_XC.shape[-1] - self.nulls, self.nulls], -1)
        return torch.cat([rest_XC, null_XC.mean(-1, keepdim=True).expand_as(null_XC)], -1)

    def shared_out(self, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> Tensor:
        """(T, K) combine weights -> the same without the null experts', whose part the others get in proportion.

        Weights that sum to 1 do so still, over the true experts. A token that chose null experts only gets zeros.
        """
        if not self.nulls:
            return weights_TK
        first = num_experts + self.total - self.nulls
        true_TK = torch.where((ids_TK >= 0) & (ids_TK < first), weights_TK, 0)
        all_T1 = torch.where(ids_TK >= 0, weights_TK, 0).sum(1, keepdim=True)
        true_T1 = true_TK.sum(1, keepdim=True)
        return true_TK * (all_T1 / torch.where(true_T1 > 0, true_T1, 1))


class ZeroComputation(nn.Module):
    """What copy and constant experts add, on whichever rank has the token."""

    def __init__(self, cfg: ZeroComputationConfig, *, dim: int, num_experts: int) -> None:
        super().__init__()
        self.cfg, self.first = cfg, num_experts + cfg.zero
        self.constants = nn.ModuleList(Constant(dim) for _ in range(cfg.constant))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, ragged: bool) -> Tensor | None:
        """(T, D), (T, K), (T, K) -> (T, D) in x's dtype, computed in that of the weights; None: always zero.

        Every token meets every copy and constant, with weight 0 where it did not choose it: sums over K and over
        constants in a fixed order, and a gradient, if only of zeros, for each parameter. ``ragged``: an id may be -1,
        and a token without choices may hold anything.
        """
        if not (self.cfg.copy or self.cfg.constant):
            return None
        if ragged:
            x_TD = torch.where((ids_TK >= 0).any(1, keepdim=True), x_TD, 0)  # 0 * NaN would be NaN
        last = self.first + self.cfg.copy
        factor_T1 = torch.where((ids_TK >= self.first) & (ids_TK < last), weights_TK, 0).sum(1, keepdim=True)
        if not self.cfg.constant:
            return (factor_T1 * x_TD).to(x_TD.dtype)
        dtype = weights_TK.dtype
        mix_P2D = torch.stack([c.mix.to(x_TD.dtype) for c in self.constants]).to(dtype)  # pyright: ignore
        vector_PD = torch.stack([c.vector.to(x_TD.dtype) for c in self.constants]).to(dtype)  # pyright: ignore
        mix_TP2 = F.linear(x_TD.to(dtype), mix_P2D.flatten(0, 1)).unflatten(1, (-1, 2)).softmax(-1)
        id_P = torch.arange(last, last + self.cfg.constant, device=ids_TK.device)
        weights_TP = torch.where(ids_TK[:, :, None] == id_P, weights_TK[:, :, None], 0).sum(1)
        of_x_TP, of_v_TP = (weights_TP[:, :, None] * mix_TP2).unbind(2)
        return ((factor_T1 + of_x_TP.sum(1, keepdim=True)) * x_TD + of_v_TP @ vector_PD).to(x_TD.dtype)


class Constant(nn.Module):
    """The parameters of one constant expert; as a gate's, whole on every rank and rounded to x's dtype first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(2, dim))  # the paper's W_c
        self.vector = nn.Parameter(torch.empty(dim))
