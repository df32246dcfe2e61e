"""Numbers of experts and top-k by layer and by step: what each layer gets, and what cannot be meant."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.cli.compose import compose
from moetrain.config import UserError
from moetrain.job import Config, check
from moetrain.model.flops import layer_flops, size
from moetrain.model.transformer import Transformer
from moetrain.moe.types import Context
from moetrain.verify.choices import replay
from moetrain.verify.shrink import shrink

SMALL = [
    "model.dim=32", "model.num_heads=2", "model.num_kv_heads=2", "model.num_layers=4", "model.first_dense=1",
    "model.vocab_size=64", "model.moe.hidden=16", "model.moe.router.renormalize=false",
]  # fmt: skip
PYRAMID = ["model.moe.per_layer.experts=[4,4,8]", "model.moe.per_layer.top_k=[1,2,2]"]
EARLY = ["model.moe.per_layer.early_top_k=[4,3]", "model.moe.per_layer.early_steps=5"]


def made(*overrides: str) -> Config:
    return compose([*SMALL, *overrides])


def test_each_layer_has_its_numbers() -> None:
    model = Transformer(made(*PYRAMID).model)
    assert [(x.layer, x.experts.gate_up.shape[0], len(x.bias_E)) for x in model.moe_layers()] == [
        (1, 4, 4), (2, 4, 4), (3, 8, 8),
    ]  # fmt: skip
    assert [x.cfg.router.top_k for x in model.moe_layers()] == [1, 2, 2]


def test_parameters_are_those_that_the_model_has_and_flops_those_of_its_top_k() -> None:
    cfg = made(*PYRAMID).model
    expert = 3 * cfg.dim * cfg.moe.hidden
    found = size(cfg)
    assert found.total == sum(p.numel() for p in Transformer(cfg).parameters())
    assert found.total - found.active == (4 + 4 + 8 - 1 - 2 - 2) * expert
    costs = layer_flops(cfg)
    assert costs[2] - costs[1] == 2 * expert
    assert costs[3] - costs[2] == 2 * cfg.dim * 4, "only the gate is larger"


def test_first_layers_take_more_experts_at_first() -> None:
    model = Transformer(made(*PYRAMID, *EARLY).model).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    ctx = Context(step=0, micro_batch=0, sample_B=torch.arange(2), position_S=torch.arange(3), routed_tokens=6.0)
    chosen = {}
    for step in (0, 4, 5):
        for layer in model.moe_layers():
            layer(x, {}, replace(ctx, step=step))
            chosen[step, layer.layer] = int(layer.load_ME.sum()) // 6
    for step in (0, 4):
        assert [chosen[step, layer] for layer in (1, 2, 3)] == [4, 3, 2]
    assert [chosen[5, layer] for layer in (1, 2, 3)] == [1, 2, 2]


def test_choices_of_a_pyramid_are_replayed_with_the_top_k_of_each_layer() -> None:
    replayed = replay(made(*PYRAMID), Path("choices"))
    assert [(moe.router.top_k, moe.router.inner.top_k) for moe in replayed.model.moe_configs] == [
        (1, 1),
        (2, 2),
        (2, 2),
    ]


def test_a_shrunk_pyramid_is_one() -> None:
    big = compose([
        "model=mixtral_8x7b", f"model.moe.per_layer.experts={[8] * 16 + [16] * 16}", "layout.pp=4", "layout.ep=8",
        f"model.moe.per_layer.early_top_k={[4] * 8}", "model.moe.per_layer.early_steps=900", "train.batch=64",
    ])  # fmt: skip
    small = shrink(big, world=32, ranks=8)
    moe = small.cfg.model.moe_configs
    assert len({x.num_experts for x in moe}) == 2
    assert moe[0].per_layer.early_top_k[0] > moe[0].router.top_k
    check(small.cfg, world=small.cfg.layout.world)


REFUSED = {
    "model.moe.per_layer.experts=[4,4]": r"experts=\[4, 4\] has 2 numbers: the model has 3 MoE layers",
    "model.moe.per_layer.top_k=[1,1,1,1]": r"top_k=\[1, 1, 1, 1\] has 4 numbers: the model has 3",
    "model.moe.per_layer.experts=[4,0,4]": r"experts=\[4, 0, 4\]: each has to be at least 1",
    "model.moe.per_layer.top_k=[2,9,2]": "MoE layer number 1 would have top-9 of 8 experts: use 1 to 8",
    "model.moe.per_layer.experts=[2,2,1]": "MoE layer number 2 would have top-2 of 1 experts",
    "model.moe.per_layer.early_top_k=[4]": r"early_steps=0 with early_top_k=\[4\]: set both",
    "model.moe.per_layer.early_steps=7": r"early_steps=7 with early_top_k=\[\]: set both",
    "model.moe.per_layer.early_top_k=[3,3,3,3] model.moe.per_layer.early_steps=7": "has 4 numbers for 3 MoE layers",
    "model.moe.per_layer.experts=[4,6,8] layout.ep=4 layout.dp=4": (
        r"layout.ep=4 does not divide model.moe.per_layer.experts: 6: use one of \[1, 2\]"
    ),
    "model.moe.per_layer.top_k=[1,2,2] model.moe.router.renormalize=true": "top_k=1 with renormalize=true",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(overrides) -> None:
    with pytest.raises(UserError, match=REFUSED[overrides]) as caught:
        check(made(*overrides.split()), world=4 if "ep=4" in overrides else 1)
    assert "\n" not in str(caught.value)
