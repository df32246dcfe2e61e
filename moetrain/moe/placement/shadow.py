"""FasterMoE's shadowing (PPoPP'22): hot experts go to every rank, one more for as long as the modelled time falls."""

import numpy as np
from torch import Tensor

from moetrain.config import config
from moetrain.moe.placement.cost import everywhere
from moetrain.moe.placement.travelling import Travelling, place
from moetrain.moe.placement.types import Costs, Grid, Placement


@config(group="placement", name="shadow")
class Shadow(Travelling):
    """Experts stay with the owners that they start with."""

    def __call__(self, load_E: Tensor, owner_E: Tensor, grid: Grid, costs: Costs) -> Placement:
        """In descending load, equal ones by id; the first that does not pay, or has no room, ends the list."""
        load, owner, R = load_E.double().numpy(), owner_E.numpy(), grid.ranks
        order_H = (-load).argsort(kind="stable")
        found = everywhere(order_H, load, owner, costs, R)
        fits_C = found.received_C <= (len(load) if grid.room is None else grid.room)
        pays_H = fits_C[1:] & (found.time_C[1:] < found.time_C[:-1] * (1 - 1e-9))
        taken = len(load) if pays_H.all() else int(pays_H.argmin())
        holds_RE = owner == np.arange(R)[:, None]
        holds_RE[:, order_H[:taken]] = True
        return place(holds_RE, owner, grid, span=R)
