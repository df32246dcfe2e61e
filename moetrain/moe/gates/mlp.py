"""The MLP gate: logits = W_2 gelu(W_1 x), for routing that is not linear in the token (as in ZAYA1, arXiv 2511.17127).

Letter: H hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config import UserError, config
from moetrain.moe.types import Carry, GateConfig


@config(group="gate", name="mlp")
class MLPGateConfig(GateConfig):
    hidden: int = 256

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise UserError(f"model.moe.gate.hidden={self.hidden}: has to be at least 1 (gate=linear has none)")

    def build(self, *, dim: int, num_experts: int) -> nn.Module:
        return MLPGate(dim, num_experts, hidden=self.hidden)


class MLPGate(nn.Module):
    def __init__(self, dim: int, num_experts: int, *, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(hidden, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))

    def forward(self, x_TD: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """(T, D) -> (T, E) logits in promote_types(x.dtype, float32), all of it; the carry passes through."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        h_TH = F.gelu(F.linear(x_TD.to(dtype), self.up.to(x_TD.dtype).to(dtype)))
        return F.linear(h_TH, self.weight.to(x_TD.dtype).to(dtype)), carry
