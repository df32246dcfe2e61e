"""Expert and expert tensor parallelism: which ranks rows travel among, which experts and widths a rank owns."""

import torch
from torch.distributed import ProcessGroup

from moetrain import world
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.moe.placement import travelling
from moetrain.moe.placement.types import Grid
from moetrain.parallel.data import Accumulate, ShardingConfig
from moetrain.parallel.plan import Held, Plan


def place(model: Transformer, mesh: Mesh, grid: Grid, *, dtype: torch.dtype) -> Plan:
    """Put every MoE layer on its stage's edp x ep x etp grid, while the model is on meta."""
    n, layers, policy = mesh.layout, model.moe_layers(), model.cfg.moe.placement
    rank, part = mesh.index("moe", "edp", "ep"), mesh.index("moe", "etp")
    group = _rows_group(model.cfg, mesh, grid)
    with torch.device("cpu"):
        sizes = [layer.cfg.num_experts for layer in layers]
        owners = policy.owners([torch.zeros(E) for E in sizes], grid)
        if policy.travels:
            travelling.check_owners(owners, sizes, grid.ranks)
    plan: Plan = {}
    for layer, owner_E in zip(layers, owners, strict=True):
        layer.place(grid, etp=n.etp, rank=rank, group=group, owner_E=owner_E)
        layer.to(dtype)
        moe, ids = layer.cfg, tuple(layer.owned)
        shapes = {"gate_up": (2, moe.hidden, model.cfg.dim), "down": (model.cfg.dim, moe.hidden)}
        for weight, shape in shapes.items():  # hidden is the dimension before last of one, the last of the other
            over = "edp*ep, from every replica to the owner" if policy.travels and grid.ranks > 1 else ""
            held = Held((moe.num_experts, *shape), 2, part * layer.width, ids, over=over)
            plan[f"blocks.{layer.layer}.moe.experts.{weight}"] = held
    return plan


def grid_of(
    cfg: ModelConfig, layout: Layout, *, experts: list[int], sharding: ShardingConfig, dtype: torch.dtype
) -> Grid:
    """Of a solved layout and a rank with MoE layers of so many ``experts``; nodes are those of the launcher, where they
    hold whole runs of the grid. Raises ``UserError`` for experts that cannot travel so."""
    ranks, here = layout.edp * layout.ep, world.ranks_here() // layout.etp
    weights = 3 * cfg.dim * -(-cfg.moe.hidden // layout.etp) * dtype.itemsize
    layers = len(experts)
    kept = layers if sharding.experts == 2 else min(2, layers)  # what is computed with, what is on its way
    grads = layers if sharding.accumulate is Accumulate.local else min(1, layers)
    room = travelling.room(cfg.moe.placement, weights * (kept + grads), layers) if layers else None
    grid = Grid(layout.edp, layout.ep, node=here if 0 < here < ranks and ranks % here == 0 else 0, room=room)
    travelling.check(grid, experts, cfg.moe.placement)
    return grid


def _rows_group(cfg: ModelConfig, mesh: Mesh, grid: Grid) -> ProcessGroup | None:
    """The ranks that rows travel among."""
    span = cfg.moe.placement.span(grid)
    axes = ("edp", "ep", "etp") if span == grid.ranks else ("ep", "etp") if span == grid.ep else ("etp",)
    return mesh.group("moe", *axes)
