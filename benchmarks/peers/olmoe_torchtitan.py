"""torchtitan's MoE transformer with OLMoE's shapes, its Qwen3: all but the norm of queries and keys, which is over
each head here and over all of them in OLMoE. Run on a CPU (0.3.0) with sdpa: the loss is ours from the same weights,
ours having its norm over each head too. flex_attention and varlen need a GPU.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan import models
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention
from torchtitan.models.common.config_utils import (
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.nn_modules import RMSNorm

from moetrain.job import Config
from peers.steps import Stepper, compiled


def qwen3() -> ModuleType:
    """The file of its model alone: the package around it wants a newer FSDP2 than some torches have, to no use here."""
    spec = importlib.util.spec_from_file_location("qwen3_model", Path(*models.__path__) / "qwen3" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qwen3_model"] = module
    spec.loader.exec_module(module)
    return module


MODEL = qwen3()

NORMAL = {"weight": lambda x: nn.init.normal_(x, std=0.02), "bias": nn.init.zeros_}
EXPERTS = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), NORMAL["weight"])
ATTENTION = {"sdpa": ScaledDotProductAttention, "flex": FlexAttention, "varlen": VarlenAttention}
NAMES = {
    "attention_norm": "attention_norm", "ffn_norm": "ffn_norm", "attention.q": "attention.qkv_linear.wq",
    "attention.k": "attention.qkv_linear.wk", "attention.v": "attention.qkv_linear.wv", "attention.out": "attention.wo",
    "attention.q_norm": "attention.q_norm", "attention.k_norm": "attention.k_norm", "moe.gate": "moe.router.gate",
    "embedding": "tok_embeddings", "norm": "norm", "head": "lm_head",
}  # fmt: skip


class Titan(Stepper):
    axes: ClassVar = {"attention": ("sdpa", "flex", "varlen"), "compiled": ("no", "each layer")}
    fused_qkv = True

    def build(self, cfg: Config, *, dtype: torch.dtype) -> nn.Module:
        m = cfg.model
        moe, head = m.moe, m.width_of_heads

        def norm(width: int) -> RMSNorm.Config:
            return RMSNorm.Config(normalized_shape=width, eps=m.norm_eps, param_init={"weight": nn.init.ones_})

        layers = [
            MODEL.Qwen3TransformerBlock.Config(
                attention_norm=norm(m.dim), ffn_norm=norm(m.dim),
                attention=make_gqa_config(
                    dim=m.dim, n_heads=m.num_heads, n_kv_heads=m.num_kv_heads, head_dim=head, wqkv_param_init=NORMAL,
                    wo_param_init=NORMAL, inner_attention=ScaledDotProductAttention.Config(), fuse_qkv=self.fused_qkv,
                    rope=CosSinRoPE.Config(dim=head, max_seq_len=cfg.train.seq_len, theta=m.rope.theta),
                    qk_norm=norm(head),
                ),
                moe=make_moe_config(
                    num_experts=moe.num_experts, load_balance_coeff=None,
                    router=make_router_config(
                        dim=m.dim, num_experts=moe.num_experts, gate_param_init=NORMAL, top_k=moe.router.top_k,
                        score_func="softmax", route_norm=False,
                    ),
                    routed_experts=make_routed_experts_config(
                        dim=m.dim, hidden_dim=moe.hidden, num_experts=moe.num_experts, top_k=moe.router.top_k,
                        param_init=EXPERTS, comm_backend="standard",
                    ),
                ),
            )
            for _ in range(m.num_layers)
        ]  # fmt: skip
        config = MODEL.Qwen3Model.Config(
            vocab_size=m.vocab_size, dim=m.dim, norm=norm(m.dim), layers=layers,
            tok_embeddings=Embedding.Config(num_embeddings=m.vocab_size, embedding_dim=m.dim, param_init=NORMAL),
            lm_head=Linear.Config(in_features=m.dim, out_features=m.vocab_size, param_init=NORMAL),
        )  # fmt: skip
        with torch.device("meta"):
            model = config.build()
        model.to_empty(device=self.device)
        with torch.no_grad():
            model.init_states(buffer_device=self.device)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        self.masks = False
        return model

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        masks = positions = None
        if self.masks:
            positions = torch.arange(tokens_BS.shape[1], device=self.device).expand_as(tokens_BS)
            masks = self.model.get_attention_masks(positions)
        logits_BSV = self.model(tokens_BS, positions=positions, attention_masks=masks)
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())

    def set(self, axis: str, option: str) -> None:
        layers = list(self.model.layers.values())
        if axis == "compiled":
            compiled(layers, option, self.device)
            return
        config = ATTENTION[option].Config()
        self.masks = option != "sdpa"
        for layer, layer_config in zip(layers, self.model.config.layers, strict=True):
            layer.attention.inner_attention = config.build()
            layer_config.attention.inner_attention = config

    def load(self, ours: dict[str, Tensor]) -> None:
        """Only where queries, keys and values have a weight each (``fused_qkv=False``)."""
        renamed = {}
        for name, x in ours.items():
            layer, part = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*?)(?:\.weight)?", name).groups()  # pyright: ignore
            at = f"layers.{layer}." if layer else ""
            if part == "moe.experts.gate_up":
                renamed[f"{at}moe.routed_experts.inner_experts.w1_EFD"] = x[:, 0]
                renamed[f"{at}moe.routed_experts.inner_experts.w3_EFD"] = x[:, 1]
            elif part == "moe.experts.down":
                renamed[f"{at}moe.routed_experts.inner_experts.w2_EDF"] = x
            else:
                renamed[f"{at}{NAMES[part]}.weight"] = x
        missing, unexpected = self.model.load_state_dict(renamed, strict=False)
        assert not unexpected, unexpected
        assert all("cache" in name for name in missing), missing


STEPPER = Titan
