"""What is between an expert's two matmuls, as functions that can be compiled into one pass over memory each."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted(both_M2F: Tensor, weights_M: Tensor) -> Tensor:
    """(M, 2F) gate(x) and up(x), (M,) -> (M, F) silu(gate(x)) * up(x) times each row's weight."""
    gate_MF, up_MF = both_M2F.chunk(2, dim=-1)
    return F.silu(gate_MF) * up_MF * weights_M[:, None].to(both_M2F.dtype)


def weighted_backward(both_M2F: Tensor, d_MF: Tensor, weights_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Given its result's gradient: that of (M, 2F), the (M, F) result once more, the gradient of the weights."""
    gate_MF, up_MF = both_M2F.chunk(2, dim=-1)
    weights_M1, share_MF = weights_M[:, None], gate_MF.sigmoid()
    act_MF = gate_MF * share_MF
    hidden_MF, d_hidden_MF = act_MF * up_MF, d_MF * weights_M1
    d_gate_MF = d_hidden_MF * up_MF * (share_MF + act_MF * (1 - share_MF))
    d_both_M2F = torch.cat([d_gate_MF, d_hidden_MF * act_MF], dim=-1)
    return d_both_M2F, hidden_MF * weights_M1, (d_MF * hidden_MF).sum(-1)
