"""The cosine gate: how well a token's direction agrees with an expert's (X-MoE, arXiv 2204.09179).

Logits are bounded, so that no expert is chosen for the length of its vector. Letter: H width after projection.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config import UserError, config
from moetrain.moe.types import Carry, GateConfig


@config(group="gate", name="cosine")
class CosineGateConfig(GateConfig):
    """logits = cos(project(x), w_e) * g / ``temperature``, g learned, 1 at first. ``hidden`` = 0 projects nothing."""

    hidden: int = 0
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.hidden < 0:
            raise UserError(f"model.moe.gate.hidden={self.hidden}: use 0 for no projection, or its width")
        if self.temperature <= 0:
            raise UserError(f"model.moe.gate.temperature={self.temperature}: has to be above 0 (try 0.07)")

    def build(self, *, dim: int, num_experts: int) -> nn.Module:
        return CosineGate(dim, num_experts, hidden=self.hidden, temperature=self.temperature)


class CosineGate(nn.Module):
    def __init__(self, dim: int, num_experts: int, *, hidden: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.project = nn.Parameter(torch.empty(hidden, dim)) if hidden else None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden or dim))
        self.norm = UnitNorm()

    def forward(self, x_TD: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """(T, D) -> (T, E) logits in promote_types(x.dtype, float32); the carry passes through."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        h_TH = x_TD.to(dtype)
        if self.project is not None:
            h_TH = F.linear(h_TH, self.project.to(x_TD.dtype).to(dtype))
        w_EH = F.normalize(self.weight.to(x_TD.dtype).to(dtype), dim=-1)
        return F.linear(self.norm(h_TH, like=x_TD.dtype), w_EH) / self.temperature, carry


class UnitNorm(nn.Module):
    """Rows of length g. As a norm's weight, g is 1 at first and does not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, h_TH: Tensor, *, like: torch.dtype) -> Tensor:
        return F.normalize(h_TH, dim=-1) * self.weight.to(like).to(h_TH.dtype)
