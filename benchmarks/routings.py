"""Tokens with their routing, drawn anew; and the truth in float64, expert by expert, that everybody is held against.

Shape letters: T tokens, D width, F expert width, E experts, K experts a token, N = T * K.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    x_TD: Tensor
    grad_TD: Tensor  # of the result
    ids_TK: Tensor
    weights_TK: Tensor  # float32, of each token's they sum to 1

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """x and the weights, to be differentiated by."""
        return self.x_TD.detach().requires_grad_(), self.weights_TK.detach().requires_grad_()

    def max_violation(self, num_experts: int) -> float:
        load_E = torch.bincount(self.ids_TK.flatten(), minlength=num_experts).double()
        return (load_E.max() / load_E.mean() - 1).item()


def draw(kind: str, shape: tuple[int, ...], device: torch.device, *, gate_ED: Tensor) -> Batch:
    """``random``: by the gate given; ``balanced``: every expert alike; ``Zipf``: expert e drawn with 1 / (e + 1)."""
    T, D, _, E, K = shape
    x_TD, grad_TD = (torch.randn(T, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    logits_TE = F.linear(x_TD, gate_ED).float()
    if kind == "random":
        scores_TK, ids_TK = logits_TE.topk(K, dim=-1)
    elif kind == "balanced":
        place_N = torch.arange(T * K, device=device) % E  # a token's K places are K experts
        ids_TK = torch.randperm(E, device=device)[place_N].view(T, K)[torch.randperm(T, device=device)]
        scores_TK = logits_TE.gather(1, ids_TK)
    else:
        likely_E = -torch.arange(1, E + 1, device=device).log()
        noise_TE = -torch.empty(T, E, device=device).exponential_().log()
        ids_TK = (likely_E + noise_TE).topk(K, dim=-1).indices
        scores_TK = logits_TE.gather(1, ids_TK)
    return Batch(x_TD, grad_TD, ids_TK, scores_TK.softmax(-1))


@torch.no_grad()
def truth(batch: Batch, gate_up_E2FD: Tensor, down_EDF: Tensor) -> dict[str, Tensor]:
    """Result and gradients by float64 matmuls, each expert's own formulas written out; kept in float32 or wider."""
    x_TD, grad_TD, weights_TK = batch.x_TD.double(), batch.grad_TD.double(), batch.weights_TK.double()
    y_TD, d_x_TD, d_weights_TK = torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(weights_TK)
    d_gate_up = torch.zeros_like(gate_up_E2FD, dtype=torch.float32)
    d_down = torch.zeros_like(down_EDF, dtype=torch.float32)
    for e in range(down_EDF.shape[0]):
        token, k = (batch.ids_TK == e).nonzero(as_tuple=True)
        x, g, w = x_TD[token], grad_TD[token], weights_TK[token, k, None]
        (gate_w, up_w), down_w = gate_up_E2FD[e].double(), down_EDF[e].double()
        gate, up = x @ gate_w.t(), x @ up_w.t()
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        hidden = silu * up
        y = hidden @ down_w.t()
        y_TD[token] += w * y  # a token has an expert once
        d_weights_TK[token, k] = (g * y).sum(1)
        d_hidden = (w * g) @ down_w
        d_up, d_gate = d_hidden * silu, d_hidden * up * (sigmoid + silu * (1 - sigmoid))
        d_x_TD[token] += d_gate @ gate_w + d_up @ up_w
        d_gate_up[e] = torch.stack([d_gate.t() @ x, d_up.t() @ x])
        d_down[e] = (w * g).t() @ hidden
    return {"y": y_TD, "x": d_x_TD, "weights": d_weights_TK, "gate_up": d_gate_up, "down": d_down}


@torch.no_grad()
def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """|found - true| / |true| of the result and of each gradient; NaN and inf stay what they are."""
    return {
        name: (torch.linalg.vector_norm(x.to(true[name].dtype) - true[name]) / torch.linalg.vector_norm(true[name]))
        .item()
        for name, x in found.items()
    }  # fmt: skip
