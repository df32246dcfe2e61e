"""The order in which a model is made parallel. Read this file first.

    build on meta -> place experts (ep) -> shard storage (FSDP2: experts over edp, the rest over dp*cp) -> allocate

Every parameter has one answer to "over which group is my gradient summed": its FSDP unit's, or, for experts whose edp
is 1, none (the all-to-all's backward has summed it already).
"""

import torch

from moetrain.config import UserError
from moetrain.mesh import Layout, Mesh
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.parallel import data, expert
from moetrain.parallel.data import ShardingConfig

_LATER = {"pp": "pipeline", "cp": "context", "tp": "tensor", "etp": "expert tensor"}


def check(layout: Layout, cfg: ModelConfig) -> None:
    """Raise ``UserError`` for what a solved layout cannot do with this model, before any rank starts."""
    for axis, name in _LATER.items():
        if (degree := getattr(layout, axis)) > 1:
            raise UserError(f"layout.{axis}={degree}: {name} parallelism is not built yet; use layout.{axis}=1")
    if cfg.moe_layers and cfg.moe.num_experts % layout.ep:
        fits = [n for n in range(1, cfg.moe.num_experts + 1) if cfg.moe.num_experts % n == 0]
        raise UserError(
            f"layout.ep={layout.ep} does not divide model.moe.num_experts={cfg.moe.num_experts}: use one of {fits}"
        )


def parallelize(cfg: ModelConfig, mesh: Mesh, *, sharding: ShardingConfig, dtype: torch.dtype) -> Transformer:
    """This rank's part of the model, allocated and not initialized. ``dtype`` is what it computes in.

    Master weights are float32, or float64 where the model computes in that. Collective: every rank calls it.
    """
    master = torch.promote_types(dtype, torch.float32)
    with torch.device("meta"):
        model = Transformer(cfg, dtype=dtype).to(master)
        expert.place(model, mesh, dtype=master)
    data.shard(model, mesh, sharding=sharding, dtype=dtype)
    model.to_empty(device=mesh.device)
    for layer in model.moe_layers():
        layer.bias_E.zero_()
        layer.begin_step(1)
    return model
