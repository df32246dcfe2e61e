"""Two ``F.grouped_mm`` with plain PyTorch around them: what one gets without any library.

Run on a CPU: outputs and gradients are those of the reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from peers import Experts, Peer, Weights, parameter


class GroupedMM(Experts):
    def __init__(self, weights: Weights, *, scatter: bool) -> None:
        super().__init__()
        self.scatter = scatter
        self.gate_up = parameter(weights.gate_up_E2FD.flatten(1, 2))
        self.down = parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        (T, K), E = ids_TK.shape, self.down.shape[0]
        ids_N, order_N = ids_TK.flatten().sort(stable=True)
        offsets_E = torch.searchsorted(ids_N, torch.arange(1, E + 1, device=ids_N.device)).int()
        token_N = order_N // K
        both_N2F = F.grouped_mm(x_TD[token_N], self.gate_up.transpose(1, 2), offs=offsets_E)
        gate_NF, up_NF = both_N2F.chunk(2, dim=-1)
        y_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, self.down.transpose(1, 2), offs=offsets_E)
        y_ND = y_ND * weights_TK.flatten()[order_N, None].to(y_ND.dtype)
        if self.scatter:
            return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)
        back_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(T * K, device=order_N.device))
        return y_ND[back_N].view(T, K, -1).sum(1)

    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return of["gate_up"].unflatten(1, (2, -1)), of["down"]


PEER = Peer(
    "F.grouped_mm",
    "torch",
    {
        "gather and sum": lambda w: GroupedMM(w, scatter=False),
        "index_add": lambda w: GroupedMM(w, scatter=True),
    },
    {},
)
