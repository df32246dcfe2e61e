"""The order in which a model is made parallel. Read this file first.

    deal layers to stages (pp) -> build this rank's on meta -> cut dense weights (tp) -> place experts (ep, etp)
    -> say who holds the rest of a sequence (cp) -> say what backward computes again (recompute), what is compiled
    -> shard storage (FSDP2: experts over edp, the rest over dp*cp)
    -> allocate

Every parameter has one answer to "over which ranks is my gradient summed": its FSDP unit's axes, and where several
ranks of tp hold the same elements, those (``plan.py``). Experts need no more: the all-to-all's backward has brought
every token's gradient to them. Experts that travel (``placing.py``) are no FSDP unit: each has one owner in the stage,
to whom its replicas' gradients go.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from moetrain.config import UserError
from moetrain.layouts import Layout, ModelShape, broken_rule
from moetrain.mesh import Mesh
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.moe.placement.travelling import Travelling
from moetrain.parallel import compile, context, data, expert, pipeline, plan, recompute, tensor
from moetrain.parallel.context import ContextConfig, Method
from moetrain.parallel.data import ShardingConfig
from moetrain.parallel.placing import Mover
from moetrain.parallel.recompute import RecomputeConfig
from moetrain.parallel.schedules import PipelineConfig


def shape(cfg: ModelConfig, context: ContextConfig) -> ModelShape:
    """The numbers of a model that a layout has to divide."""
    return ModelShape(
        num_layers=cfg.num_layers, num_heads=cfg.num_heads, num_kv_heads=cfg.num_kv_heads,
        experts=tuple(sorted({moe.num_experts for moe in cfg.moe_configs})), ulysses=context.method is Method.ulysses,
    )  # fmt: skip


def check(
    layout: Layout,
    cfg: ModelConfig,
    *,
    context: ContextConfig,
    stages: PipelineConfig,
    sharding: ShardingConfig,
    dtype: torch.dtype,
) -> None:
    """Raise ``UserError`` for what a solved layout cannot do with this model, before any rank starts."""
    if rule := broken_rule(layout, shape(cfg, context)):
        raise UserError(rule)
    every, sizes = pipeline.stages(cfg, layout, stages), dict(zip(cfg.moe_layers, cfg.moe_configs, strict=True))
    for at in range(layout.pp):
        mine = every if layout.pp == 1 else [every[s] for s in stages.stages_of(at, pp=layout.pp)]
        experts = [sizes[i].num_experts for stage in mine for i in stage.layers if i in sizes]
        grid = expert.grid_of(cfg, layout, experts=experts, sharding=sharding, dtype=dtype)
        if experts:
            cfg.moe.dispatcher.check(ranks=cfg.moe.placement.span(grid) * layout.etp)


@dataclass(frozen=True)
class Parallel:
    """This rank's part of a model, and how it holds each parameter."""

    model: Transformer
    plan: plan.Plan
    pipeline: pipeline.Pipeline | None  # None: one stage
    mover: Mover | None  # None: experts stay where they are


def parallelize(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    sharding: ShardingConfig,
    context_cfg: ContextConfig,
    stages: PipelineConfig,
    recompute_cfg: RecomputeConfig,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Parallel:
    """This rank's part of the model, zeros everywhere. ``dtype`` is what it computes in. Collective.

    Master weights are float32, or float64 where the model computes in that.
    """
    master = torch.promote_types(dtype, torch.float32)
    every, pp = pipeline.stages(cfg, mesh.layout, stages), mesh.layout.pp
    mine = every if pp == 1 else [every[s] for s in stages.stages_of(mesh.index("dense", "pp"), pp=pp)]
    with torch.device("meta"):
        model = Transformer(cfg, dtype=dtype, stages=tuple(mine)).to(master)
        experts = [layer.cfg.num_experts for layer in model.moe_layers()]
        grid = expert.grid_of(cfg, mesh.layout, experts=experts, sharding=sharding, dtype=dtype)
        held = tensor.place(model, mesh) | expert.place(model, mesh, grid, dtype=master)
    if cfg.tie_embeddings and pp > 1 and stages.rank_of(len(every) - 1, pp=pp) != 0:
        pipeline.tie(held, mesh)
    context.place(model, mesh, cfg=context_cfg)
    recompute.place(model, cfg=recompute_cfg)
    compile.place(model, on=compiled)
    plan.check_complete(model, held)
    data.shard(model, mesh, sharding=sharding, dtype=dtype)
    held = {name: replace(h, **data.summed(name, model, mesh)) for name, h in held.items()}
    allocate(model, mesh.device)
    mover = None
    if cfg.moe_layers and isinstance(policy := cfg.moe.placement, Travelling):
        mover = Mover(model, mesh, held, policy=policy, grid=grid, sharding=sharding, dtype=dtype)
    pipe = pipeline.Pipeline(stages, mesh, every, cfg=cfg, dtype=dtype) if pp > 1 else None
    return Parallel(model, held, pipe, mover)


def allocate(model: Transformer, device: torch.device) -> None:
    """From meta to memory, zeros everywhere. A dry run (``memory/``) makes fake tensors from here on."""
    model.to_empty(device=device)
    with torch.no_grad():
        for x in itertools.chain(model.parameters(), model.buffers()):
            x.zero_()
    for layer in model.moe_layers():
        layer.begin_step(1)
