"""The truth, in plain loops: one token, one expert at a time. Nothing here is shared with the product."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def moe(
    x_BSD: Tensor,
    gate_ED: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    factor: float | None = None,
) -> tuple[Tensor, Tensor, int]:
    """A dense MoE layer -> (y_BSD, load_E, assignments dropped). ``factor``: capacity with drop scope ``sequence``."""
    E = len(gate_ED)
    y_BSD, load_E, dropped = torch.zeros_like(x_BSD), torch.zeros(E, dtype=torch.int64), 0
    for b, x_SD in enumerate(x_BSD):
        kept = [0] * E
        capacity = math.inf if factor is None else math.ceil(factor * len(x_SD) * top_k / E)
        for s, x_D in enumerate(x_SD):
            logits_E = gate_ED @ x_D
            scores_E = logits_E.softmax(0) if score == "softmax" else logits_E.sigmoid()
            steer_E = (scores_E if bias_E is None else scores_E + bias_E).tolist()
            chosen = sorted(range(E), key=lambda e: (-steer_E[e], e))[:top_k]
            total = sum(scores_E[e] for e in chosen) if renormalize else 1.0
            for e in chosen:
                load_E[e] += 1
                kept[e] += 1
                if kept[e] > capacity:
                    dropped += 1
                    continue
                hidden_F = F.silu(gate_up_E2FD[e, 0] @ x_D) * (gate_up_E2FD[e, 1] @ x_D)
                y_BSD[b, s] = y_BSD[b, s] + scale * scores_E[e] / total * (down_EDF[e] @ hidden_F)
    return y_BSD, load_E, dropped


def chosen(P_E: Tensor, top_k: int) -> list[int]:
    row = P_E.tolist()
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]


def switch(logits_BSE: Tensor, *, top_k: int, counts: list[int] | None = None) -> Tensor:
    """E * sum_e f_e * sum_t P_te, f over all sequences together or of ``counts`` (unscaled, undivided)."""
    P_TE = logits_BSE.flatten(0, 1).softmax(-1)
    E = P_TE.shape[1]
    if counts is None:
        counts = [0] * E
        for P_E in P_TE:
            for e in chosen(P_E, top_k):
                counts[e] += 1
    return sum(E * counts[e] / sum(counts) * P_TE[t, e] for t in range(len(P_TE)) for e in range(E))  # pyright: ignore


def sequence(logits_BSE: Tensor, *, top_k: int) -> Tensor:
    return sum(switch(logits_SE[None], top_k=top_k) for logits_SE in logits_BSE)  # pyright: ignore


def z_loss(logits_BSE: Tensor, *, top_k: int) -> Tensor:
    return sum(row.exp().sum().log() ** 2 for row in logits_BSE.flatten(0, 1))  # pyright: ignore


def device(logits_BSE: Tensor, *, top_k: int, num_groups: int = 2) -> Tensor:
    """sum over groups of (mean of their experts' f_e) * (sum of their experts' P), f_e = E * share of assignments."""
    P_TE = logits_BSE.flatten(0, 1).softmax(-1)
    (T, E), total = P_TE.shape, torch.zeros((), dtype=P_TE.dtype)
    f = [0.0] * E
    for P_E in P_TE:
        for e in chosen(P_E, top_k):
            f[e] += E / (top_k * T)
    for g in range(num_groups):
        group = range(g * E // num_groups, (g + 1) * E // num_groups)
        total = total + sum(f[e] for e in group) / len(group) * sum(P_TE[t, e] for t in range(T) for e in group)
    return total


def communication(logits_BSE: Tensor, *, top_k: int, num_groups: int = 2, max_groups: int = 1) -> Tensor:
    """sum over groups of D / (M * T) * (tokens that go there) * (sum of their experts' P)."""
    P_TE = logits_BSE.flatten(0, 1).softmax(-1)
    (T, E), total = P_TE.shape, torch.zeros((), dtype=P_TE.dtype)
    for g in range(num_groups):
        group = range(g * E // num_groups, (g + 1) * E // num_groups)
        sent = sum(any(e in group for e in chosen(P_E, top_k)) for P_E in P_TE)
        total = total + num_groups / (max_groups * T) * sent * sum(P_TE[t, e] for t in range(T) for e in group)
    return total


def entropy(logits_BSE: Tensor, *, top_k: int) -> Tensor:
    return -sum(p * p.log() for p in logits_BSE.softmax(-1).flatten())  # pyright: ignore
