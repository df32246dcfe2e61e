"""The recurrent gate: a layer's routing remembers how the layers below routed (RMoE, arXiv 2408.06793).

The paper shares one GRU between all layers; here each layer has its own, as a pipeline's stages share no weights.
Letter: H width of the state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config import UserError, config
from moetrain.moe.types import Carry, GateConfig

_STATE = "recurrent"


@config(group="gate", name="recurrent")
class RecurrentGateConfig(GateConfig):
    """x' = W_p x, h = GRU(x', h of the MoE layer before), logits = W h; h is 0 before the first one."""

    hidden: int = 128

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise UserError(f"model.moe.gate.hidden={self.hidden}: has to be at least 1 (the paper has 128)")

    @property
    def carries(self) -> dict[str, int]:
        return {_STATE: self.hidden}

    def build(self, *, dim: int, num_experts: int) -> nn.Module:
        return RecurrentGate(dim, num_experts, hidden=self.hidden)


class RecurrentGate(nn.Module):
    def __init__(self, dim: int, num_experts: int, *, hidden: int) -> None:
        super().__init__()
        self.project = nn.Parameter(torch.empty(hidden, dim))
        self.input, self.state = Affine(hidden, 3 * hidden), Affine(hidden, 3 * hidden)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))

    def forward(self, x_TD: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """(T, D) -> (T, E) logits in promote_types(x.dtype, float32), and the carry with this layer's state in x's."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TH = F.linear(x_TD.to(dtype), self.project.to(x_TD.dtype).to(dtype))
        before_TH = carry[_STATE].to(dtype) if _STATE in carry else torch.zeros_like(x_TH)
        reset_TH, update_TH, new_TH = self.input(x_TH, like=x_TD.dtype).chunk(3, -1)
        from_reset_TH, from_update_TH, from_new_TH = self.state(before_TH, like=x_TD.dtype).chunk(3, -1)
        new_TH = (new_TH + (reset_TH + from_reset_TH).sigmoid() * from_new_TH).tanh()
        state_TH = torch.lerp(new_TH, before_TH, (update_TH + from_update_TH).sigmoid())
        logits_TE = F.linear(state_TH, self.weight.to(x_TD.dtype).to(dtype))
        return logits_TE, carry | {_STATE: state_TH.to(x_TD.dtype)}


class Affine(nn.Module):
    """W x + b in x's dtype, of weights rounded to ``like`` first."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, dim))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x_TH: Tensor, *, like: torch.dtype) -> Tensor:
        return F.linear(x_TH, self.weight.to(like).to(x_TH.dtype), self.bias.to(like).to(x_TH.dtype))
