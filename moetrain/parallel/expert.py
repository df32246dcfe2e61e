"""Expert parallelism: which ranks tokens travel among, and which experts a rank owns."""

import torch

from moetrain.mesh import Mesh
from moetrain.model.transformer import Transformer


def place(model: Transformer, mesh: Mesh, *, dtype: torch.dtype) -> None:
    """Put every MoE layer on its stage's edp x ep grid. The model is on meta: experts owned elsewhere cost nothing."""
    group = mesh.group("moe", "ep")
    rank = mesh.index("moe", "edp", "ep")
    for layer in model.moe_layers():
        layer.place(edp=mesh.layout.edp, ep=mesh.layout.ep, rank=rank, group=group)
        layer.to(dtype)
