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


def switch(x_BSD: Tensor, gate_ED: Tensor, *, top_k: int, block: int) -> Tensor:
    """sum over blocks of ``block`` sequences of E * sum_e f_e * sum_t P_te (unscaled, undivided)."""
    total = x_BSD.new_zeros(())
    for x_TD in x_BSD.unflatten(0, (-1, block)).flatten(1, 2):
        P_TE = (x_TD @ gate_ED.T).softmax(-1)
        E = len(gate_ED)
        counts = [0] * E
        for row in P_TE.tolist():
            for e in sorted(range(E), key=lambda e: (-row[e], e))[:top_k]:
                counts[e] += 1
        f_E = torch.tensor(counts, dtype=x_TD.dtype) / sum(counts)
        total = total + E * (f_E * P_TE.sum(0)).sum()
    return total
