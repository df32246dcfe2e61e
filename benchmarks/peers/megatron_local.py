"""Megatron-Core's experts with its own permutation: one MLP after the other, the legacy grouped GEMM, TE's grouped MLP.

Run on a CPU (megatron-core 0.16.1, from the package index with ``--no-deps``): the sequential ones. The grouped GEMM
needs ``nv-grouped-gemm``, TE's ``transformer-engine`` and a GPU: without them Megatron refuses, and says why.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from peers import Experts, Peer, Weights, parameter


def alone() -> dist.ProcessGroup:
    """A group of one: Megatron asks one for its size, also where nothing is split."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class Megatron(Experts):
    """``grouped``: its legacy grouped GEMM; ``te``: Transformer Engine's; ``fused``: the fused SwiGLU, permutation."""

    def __init__(self, weights: Weights, *, grouped: bool = False, te: bool = False, fused: bool = False) -> None:
        super().__init__()
        (E, _, width, D), dtype = weights.gate_up_E2FD.shape, weights.gate_up_E2FD.dtype
        cfg = TransformerConfig(
            num_layers=1, hidden_size=D, num_attention_heads=1, ffn_hidden_size=width, moe_ffn_hidden_size=width,
            num_moe_experts=E, moe_router_topk=weights.top_k, gated_linear_unit=True, activation_func=F.silu,
            add_bias_linear=False, bf16=dtype is torch.bfloat16, params_dtype=dtype, perform_initialization=False,
            use_cpu_initialization=weights.down_EDF.device.type == "cpu", bias_activation_fusion=fused,
            moe_grouped_gemm=grouped or te,
        )  # fmt: skip
        provider = TESpecProvider() if te else LocalSpecProvider()
        module, submodules = provider.grouped_mlp_modules(grouped or te, grouped)
        groups = ProcessGroupCollection()
        for name in ("ep", "expt_tp", "expt_dp", "tp"):
            setattr(groups, name, alone())
        rest = {} if submodules is None else {"submodules": submodules}
        self.fused_permutation, self.num_experts = te and fused, E
        self.experts = module(num_local_experts=E, config=cfg, pg_collection=groups, **rest)
        self._fill(weights, grouped=grouped)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        T, K = ids_TK.shape
        map_TE = torch.zeros(T, self.num_experts, dtype=torch.bool, device=x_TD.device).scatter_(1, ids_TK, True)
        probs_TE = torch.zeros(map_TE.shape, device=x_TD.device).scatter(1, ids_TK, weights_TK)
        x_ND, probs_N, order_N, *_ = permute(
            x_TD, map_TE, probs=probs_TE, num_out_tokens=T * K, fused=self.fused_permutation
        )
        load_E = map_TE.sum(0)
        y_ND, _ = self.experts(x_ND, load_E.cpu() if self.num_experts > 1 else load_E, probs_N)
        return unpermute(y_ND, order_N, x_TD.shape, fused=self.fused_permutation)

    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        E = self.num_experts
        if "experts.weight1" in of:  # (D, E * 2F), (E * F, D), to be viewed by expert
            D = of["experts.weight1"].shape[0]
            up_ED2F, down_EFD = of["experts.weight1"].view(E, D, -1), of["experts.weight2"].view(E, -1, D)
            return up_ED2F.transpose(1, 2).unflatten(1, (2, -1)), down_EFD.transpose(1, 2)
        up, down = (torch.stack([of[name] for name in names]) for names in self._names())
        return up.unflatten(1, (2, -1)), down

    def _names(self) -> tuple[list[str], list[str]]:
        """Of each expert's two weights, where it has its own."""
        experts = range(self.num_experts)
        if hasattr(self.experts, "local_experts"):
            local = "experts.local_experts.{}.linear_fc{}.weight"
            return [local.format(e, 1) for e in experts], [local.format(e, 2) for e in experts]
        return [f"experts.linear_fc1.weight{e}" for e in experts], [f"experts.linear_fc2.weight{e}" for e in experts]

    def _fill(self, weights: Weights, *, grouped: bool) -> None:
        up_E2FD, down_EDF = weights.gate_up_E2FD.flatten(1, 2), weights.down_EDF
        if grouped:
            D = down_EDF.shape[1]
            self.experts.weight1 = parameter(up_E2FD.transpose(1, 2).contiguous().view(D, -1))
            self.experts.weight2 = parameter(down_EDF.transpose(1, 2).contiguous().view(-1, D))
            return
        at = dict(self.named_parameters())
        with torch.no_grad():
            for names, w in zip(self._names(), (up_E2FD, down_EDF), strict=True):
                for name, one in zip(names, w, strict=True):
                    at[name].copy_(one)


PEER = Peer(
    "Megatron-Core",
    "megatron-core",
    {
        "sequential, fused SwiGLU": partial(Megatron, fused=True),
        "sequential": Megatron,
        "grouped GEMM": partial(Megatron, grouped=True),
        "TE grouped": partial(Megatron, te=True),
        "TE grouped, fused permutation": partial(Megatron, te=True, fused=True),
    },
    {},
)
