"""ScatterMoE's ``GLUMLP``: Triton kernels that gather and scatter inside the grouped GEMM (arXiv 2403.08245).

A checkout of github.com/shawntan/scattermoe on the path (``PEERS``). Its kernels need a GPU; the adapter has run on a
CPU in Triton's interpreter (``TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1``), in float32: the interpreter's bf16 is not
to be trusted. Its first projection gives (up, gate): it applies the activation to the second half.
"""

import torch
from scattermoe.mlp import GLUMLP
from torch import Tensor, nn

from peers import Experts, Peer, Weights, parameter


class Scatter(Experts):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        E, _, F, D = weights.gate_up_E2FD.shape
        with torch.device("meta"):
            self.mlp = GLUMLP(D, F, E, weights.top_k, activation=nn.SiLU())
        self.mlp.experts.weight = parameter(weights.gate_up_E2FD.flip(1).flatten(1, 2))
        self.mlp.output_experts.weight = parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.mlp(x_TD, weights_TK.to(x_TD.dtype), ids_TK)  # it multiplies in the dtype of x

    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return of["mlp.experts.weight"].unflatten(1, (2, -1)).flip(1), of["mlp.output_experts.weight"]


PEER = Peer("ScatterMoE", "scattermoe", {"GLUMLP": Scatter}, {})
