"""The linear gate: logits = W x, in float32 or wider whatever the model computes in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config import config
from moetrain.moe.types import Carry, GateConfig


@config(group="gate", name="linear")
class LinearGateConfig(GateConfig):
    def build(self, *, dim: int, num_experts: int) -> nn.Module:
        return LinearGate(dim, num_experts)


class LinearGate(nn.Module):
    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_TD: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """(T, D) -> (T, E) logits in promote_types(x.dtype, float32), matmul included; the carry passes through.

        The weight is rounded to x's dtype first, since that is how sharded storage hands it over: one rank does alike.
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), self.weight.to(x_TD.dtype).to(dtype)), carry
