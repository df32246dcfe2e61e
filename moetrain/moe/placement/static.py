"""Classic expert parallelism: experts stay where they are, E / ep consecutive ones on each rank of an ep row."""

import torch
from torch import Tensor

from moetrain.config import config
from moetrain.moe.placement.types import Costs, Grid, Placement, PlacementPolicy


@config(group="placement", name="static")
class Static(PlacementPolicy):
    def __call__(self, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> Placement:
        """Block j of the experts on rank (i, j) for every i; tokens stay in their ep row."""
        block_RS = torch.arange(load_E.numel()).view(grid.ep, -1)
        owner_E = torch.arange(grid.ep).repeat_interleave(block_RS.shape[1])
        return Placement(block_RS.repeat(grid.edp, 1), owner_E, span=grid.ep)
