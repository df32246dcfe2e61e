"""SonicMoE's experts from given routing: CuTe kernels for Hopper (arXiv 2512.14080), and the same through QuACK.

A checkout of github.com/Dao-AILab/sonic-moe on the path (``PEERS``), nvidia-cutlass-dsl and the quack-kernels of its
requirements. Never run here: its kernels need a Hopper GPU. Rows of its first projection alternate: gate, up, gate, up.
"""

from functools import partial

import torch
from sonicmoe import enable_quack_gemm
from sonicmoe.enums import ActivationType
from sonicmoe.functional import moe_general_routing_inputs, moe_TC_softmax_topk_layer
from torch import Tensor, nn

from peers import Experts, Peer, Weights, parameter


class Sonic(Experts):
    def __init__(self, weights: Weights, *, quack: bool) -> None:
        super().__init__()
        self.quack = quack
        self.up = parameter(weights.gate_up_E2FD.transpose(1, 2).flatten(1, 2))
        self.down = parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        (T, K), E = ids_TK.shape, self.down.shape[0]
        token_N = torch.arange(T, device=x_TD.device, dtype=torch.int32).repeat_interleave(K)
        with enable_quack_gemm(self.quack):
            y_TD, _ = moe_general_routing_inputs(
                x_TD, weights_TK.flatten(), token_N, ids_TK.flatten().int(), self.up.permute(1, 2, 0), None,
                self.down.permute(1, 2, 0), None, E, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU,
            )  # fmt: skip
        return y_TD

    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return of["up"].unflatten(1, (-1, 2)).transpose(1, 2), of["down"]


class Layer(nn.Module):
    """(T, D) -> (T, D), gate and top-k included: its softmax is over the K chosen logits."""

    def __init__(self, weights: Weights, gate_ED: Tensor, *, quack: bool) -> None:
        super().__init__()
        self.quack, self.top_k, self.gate = quack, weights.top_k, parameter(gate_ED)
        self.up = parameter(weights.gate_up_E2FD.transpose(1, 2).flatten(1, 2))
        self.down = parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        with enable_quack_gemm(self.quack):
            y_TD, *_ = moe_TC_softmax_topk_layer(
                x_TD, self.gate, self.up.permute(1, 2, 0), None, self.down.permute(1, 2, 0), None, self.top_k,
                torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU,
            )  # fmt: skip
        return y_TD


PEER = Peer(
    "SonicMoE",
    "sonicmoe",
    {"CuTe": partial(Sonic, quack=False), "QuACK": partial(Sonic, quack=True)},
    {"CuTe": partial(Layer, quack=False), "QuACK": partial(Layer, quack=True)},
)
