"""The order in which a model is made parallel. Read this file first.

    build on meta -> cut dense weights (tp) -> place experts (ep, etp) -> say who holds the rest of a sequence (cp)
    -> shard storage (FSDP2: experts over edp, the rest over dp*cp) -> allocate

Every parameter has one answer to "over which ranks is my gradient summed": its FSDP unit's axes, and where several
ranks of tp hold the same elements, those (``plan.py``). Experts need no more: the all-to-all's backward has brought
every token's gradient to them.
"""

from dataclasses import dataclass, replace

import torch

from moetrain.config import UserError
from moetrain.mesh import Layout, Mesh
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.parallel import context, data, expert, plan, tensor
from moetrain.parallel.context import ContextConfig
from moetrain.parallel.data import ShardingConfig


def check(layout: Layout, cfg: ModelConfig, *, context: ContextConfig) -> None:
    """Raise ``UserError`` for what a solved layout cannot do with this model, before any rank starts."""
    if layout.pp > 1:
        raise UserError(f"layout.pp={layout.pp}: pipeline parallelism is not built yet; use layout.pp=1")
    if cfg.moe_layers and cfg.moe.num_experts % layout.ep:
        fits = [n for n in range(1, cfg.moe.num_experts + 1) if cfg.moe.num_experts % n == 0]
        raise UserError(
            f"layout.ep={layout.ep} does not divide model.moe.num_experts={cfg.moe.num_experts}: use one of {fits}"
        )


@dataclass(frozen=True)
class Parallel:
    """This rank's part of a model, and how it holds each parameter."""

    model: Transformer
    plan: plan.Plan


def parallelize(
    cfg: ModelConfig, mesh: Mesh, *, sharding: ShardingConfig, context_cfg: ContextConfig, dtype: torch.dtype
) -> Parallel:
    """This rank's part of the model, zeros everywhere. ``dtype`` is what it computes in. Collective.

    Master weights are float32, or float64 where the model computes in that.
    """
    master = torch.promote_types(dtype, torch.float32)
    with torch.device("meta"):
        model = Transformer(cfg, dtype=dtype).to(master)
        held = tensor.place(model, mesh) | expert.place(model, mesh, dtype=master)
    context.place(model, mesh, cfg=context_cfg)
    plan.check_complete(model, held)
    data.shard(model, mesh, sharding=sharding, dtype=dtype)
    held = {name: replace(h, **data.summed(name, mesh)) for name, h in held.items()}
    model.to_empty(device=mesh.device)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for layer in model.moe_layers():
        layer.bias_E.zero_()
        layer.begin_step(1)
    return Parallel(model, held)
