"""Classic expert parallelism: experts stay where they are, E / ep consecutive ones on each rank of an ep row."""

import torch
from torch import Tensor

from moetrain.config import config
from moetrain.moe.types import Placement, PlacementPolicy


@config(group="placement", name="static")
class Static(PlacementPolicy):
    def __call__(self, load_E: Tensor, *, edp: int, ep: int) -> Placement:
        """(E,) -> block j of the experts on rank (i, j) for every i; tokens stay in their ep row."""
        block_RS = torch.arange(load_E.numel()).view(ep, -1)
        return Placement(block_RS.repeat(edp, 1), torch.arange(ep).repeat_interleave(block_RS.shape[1]), span=ep)
