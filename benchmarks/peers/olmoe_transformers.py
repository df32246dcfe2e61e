"""Hugging Face transformers' ``OlmoeForCausalLM``. Run on a CPU (5.23): the loss is ours from the same weights."""

import re
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from moetrain.job import Config
from peers.steps import Stepper, compiled

NAMES = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm", "moe.gate": "mlp.gate",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj", "moe.experts.down": "mlp.experts.down_proj",
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip


class Olmoe(Stepper):
    axes: ClassVar = {
        "experts": ("grouped_mm", "eager", "sonicmoe", "deepgemm", "batched_mm"),
        "attention": ("sdpa", "flash_attention_3", "flash_attention_2", "flex_attention", "eager"),
        "compiled": ("no", "each layer"),
    }
    model: OlmoeForCausalLM  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, cfg: Config, *, dtype: torch.dtype) -> nn.Module:
        m = cfg.model
        config = OlmoeConfig(
            vocab_size=m.vocab_size, hidden_size=m.dim, intermediate_size=m.moe.hidden, num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads, num_experts=m.moe.num_experts,
            num_experts_per_tok=m.moe.router.top_k, norm_topk_prob=False, max_position_embeddings=cfg.train.seq_len,
            rms_norm_eps=m.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": m.rope.theta},
            tie_word_embeddings=False, use_cache=False, output_router_logits=False, pad_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa", experts_implementation="grouped_mm",
        )  # fmt: skip
        with torch.device(self.device):
            return OlmoeForCausalLM._from_config(config, dtype=dtype)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        found = self.model(tokens_BS, labels=targets_BS, shift_labels=targets_BS).loss
        assert found is not None
        return found

    def set(self, axis: str, option: str) -> None:
        if axis == "experts":
            if self.mixed and option == "grouped_mm":
                raise ValueError("autocast leaves grouped_mm in float32: not the same dtype")
            self.model.set_experts_implementation(option)
        elif axis == "attention":
            self.model.set_attn_implementation(option)
        else:
            compiled(list(self.model.model.layers), option, self.device)

    def load(self, ours: dict[str, Tensor]) -> None:
        renamed = {}
        for name, x in ours.items():
            layer, part = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*?)(?:\.weight)?", name).groups()  # pyright: ignore
            tail = "" if part.startswith("moe.experts") else ".weight"
            at = f"model.layers.{layer}." if layer else ""
            renamed[f"{at}{NAMES[part]}{tail}"] = x.flatten(1, 2) if x.dim() == 4 else x
        self.model.load_state_dict(renamed)


STEPPER = Olmoe
