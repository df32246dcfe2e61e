"""Hugging Face transformers' experts (``OlmoeExperts``) with each implementation that it registers; its whole block.

Run on a CPU (transformers 5.23: eager, grouped_mm, batched_mm). deepgemm and sonicmoe need a GPU, and the package
``kernels`` with those kernels in its cache: without them transformers refuses, and says why.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeSparseMoeBlock

from peers import Experts, Peer, Weights


def configured(weights: Weights, implementation: str) -> OlmoeConfig:
    E, _, F, D = weights.gate_up_E2FD.shape
    return OlmoeConfig(
        hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=weights.top_k,
        norm_topk_prob=weights.top_k > 1, experts_implementation=implementation,
    )  # fmt: skip


def fill(experts: OlmoeExperts, weights: Weights) -> None:
    experts.gate_up_proj = nn.Parameter(weights.gate_up_E2FD.flatten(1, 2).clone())
    experts.down_proj = nn.Parameter(weights.down_EDF.clone())


class Transformers(Experts):
    def __init__(self, weights: Weights, *, implementation: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.experts = OlmoeExperts(configured(weights, implementation))
        fill(self.experts, weights)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.experts(x_TD, ids_TK, weights_TK.to(x_TD.dtype))  # its router hands over the dtype of x

    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return of["experts.gate_up_proj"].unflatten(1, (2, -1)), of["experts.down_proj"]


class Block(nn.Module):
    """(T, D) -> (T, D), gate and top-k included."""

    def __init__(self, weights: Weights, gate_ED: Tensor, *, implementation: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.block = OlmoeSparseMoeBlock(configured(weights, implementation))
        self.block.gate.weight = nn.Parameter(gate_ED.clone())
        fill(self.block.experts, weights)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.block(x_TD[None])[0]


IMPLEMENTATIONS = ("grouped_mm", "eager", *sorted({*ALL_EXPERTS_FUNCTIONS.keys()} - {"grouped_mm", "eager"}))

PEER = Peer(
    "transformers",
    "transformers",
    {name: partial(Transformers, implementation=name) for name in IMPLEMENTATIONS},
    {name: partial(Block, implementation=name) for name in IMPLEMENTATIONS},
)
