"""torchtitan's routed experts (local dispatcher and grouped experts) and its whole MoE layer.

Run on a CPU (torchtitan 0.3.0, which needs spmd_types; both come from the package index, with ``--no-deps``). It
computes in bf16 whatever it is given, as its experts cast.
"""

import torch
from torch import Tensor, nn
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from peers import Experts, Peer, Weights, parameter, split


def configured(weights: Weights) -> RoutedExperts.Config:
    E, _, F, D = weights.gate_up_E2FD.shape
    return RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=weights.top_k),
    )


def fill(experts: GroupedExperts, weights: Weights) -> None:
    gate_EFD, up_EFD = split(weights.gate_up_E2FD)
    experts.w1_EFD, experts.w3_EFD = parameter(gate_EFD), parameter(up_EFD)
    experts.w2_EDF = parameter(weights.down_EDF)


class Titan(Experts):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        with torch.device("meta"):
            self.routed = configured(weights).build()
        fill(self.routed.inner_experts, weights)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        E = self.routed.token_dispatcher.num_experts  # how its layer counts:
        chosen_TE = torch.zeros(x_TD.shape[0], E, dtype=torch.bool, device=x_TD.device).scatter_(1, ids_TK, True)
        return self.routed(x_TD[None], weights_TK[None], ids_TK[None], chosen_TE.sum(0))[0]

    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        w1, w2, w3 = (of[f"routed.inner_experts.{name}"] for name in ("w1_EFD", "w2_EDF", "w3_EFD"))
        return torch.stack([w1, w3], 1), w2


class Layer(nn.Module):
    """(T, D) -> (T, D), gate and top-k included."""

    def __init__(self, weights: Weights, gate_ED: Tensor) -> None:
        super().__init__()
        E, D = gate_ED.shape
        router = TokenChoiceTopKRouter.Config(
            num_experts=E, gate=Linear.Config(in_features=D, out_features=E), top_k=weights.top_k, score_func="softmax",
            route_norm=weights.top_k > 1,
        )  # fmt: skip
        with torch.device("meta"):
            self.moe = MoE.Config(
                num_experts=E, routed_experts=configured(weights), router=router, load_balance_coeff=None
            ).build()
        fill(self.moe.routed_experts.inner_experts, weights)
        self.moe.router.gate.weight = parameter(gate_ED)
        self.moe.tokens_per_expert_E = torch.zeros(E, device=gate_ED.device)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.moe(x_TD[None])[0]


PEER = Peer("torchtitan", "torchtitan", {"grouped experts": Titan}, {"MoE": Layer})
