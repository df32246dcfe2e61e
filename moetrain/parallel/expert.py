"""Expert and expert tensor parallelism: which ranks rows travel among, which experts and widths a rank owns."""

import torch

from moetrain.mesh import Mesh
from moetrain.model.transformer import Transformer
from moetrain.parallel.plan import Held, Plan


def place(model: Transformer, mesh: Mesh, *, dtype: torch.dtype) -> Plan:
    """Put every MoE layer on its stage's edp x ep x etp grid, while the model is on meta."""
    n, group = mesh.layout, mesh.group("moe", "ep", "etp")
    rank, part = mesh.index("moe", "edp", "ep"), mesh.index("moe", "etp")
    plan: Plan = {}
    for layer in model.moe_layers():
        layer.place(edp=n.edp, ep=n.ep, etp=n.etp, rank=rank, group=group)
        layer.to(dtype)
        moe, ids = layer.cfg, tuple(layer.placement.slots_of(rank))
        shapes = {"gate_up": (2, moe.hidden, model.cfg.dim), "down": (model.cfg.dim, moe.hidden)}
        for weight, shape in shapes.items():  # hidden is the dimension before last of one, the last of the other
            held = Held((moe.num_experts, *shape), 2, part * layer.width, ids)
            plan[f"blocks.{layer.layer}.moe.experts.{weight}"] = held
    return plan
