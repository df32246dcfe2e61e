"""Every expert on every rank, as in plain data parallelism: tokens never travel."""

import numpy as np
from torch import Tensor

from moetrain.config import config
from moetrain.moe.placement.travelling import place
from moetrain.moe.placement.types import Costs, Grid, Placement, PlacementPolicy


@config(group="placement", name="replicate_all")
class ReplicateAll(PlacementPolicy):
    @property
    def travels(self) -> bool:
        return True

    def __call__(self, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> Placement:
        """The same whatever the load."""
        return place(np.ones((grid.ranks, len(owner_E)), bool), owner_E.numpy(), grid, span=1)
