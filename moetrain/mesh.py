"""Parallel folding: one list of ranks, reshaped under different names for different parts of the model.

    dense:   (pp, dp, cp, tp)                     attention, gates, shared experts, dense layers
    moe:     (pp, edp, ep, etp)                   routed experts; ep may exceed dp: it folds over dp, cp and tp
    fsdp:    (pp, replicate, dp*cp/replicate, tp) storage of dense parameters: context ranks hold the same weights
    experts: (pp, replicate, edp/replicate, ep*etp) storage of experts; whole replicas where they divide edp

The pipeline axis comes first in every view, so a rank is on the same stage whichever view it looks through
(arXiv 2504.14960 with the pipeline outermost). Integers first; groups are made once and shared by rank tuple.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moetrain.config import UserError, config, replace

AXES = ("pp", "dp", "cp", "tp", "ep", "etp")
_NO_AXIS = ("replicate",)  # how dp is stored, not another way to split the work


@config
class Layout:
    """How many ways each thing is split. ``dp`` = -1 takes the ranks that are left; ``edp`` always does.

    ``replicate`` copies of the weights are kept within dp, each sharded over dp / replicate * cp ranks (HSDP).
    """

    pp: int = 1
    dp: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    replicate: int = 1

    def __post_init__(self) -> None:
        for axis in (*AXES, *_NO_AXIS):
            value = getattr(self, axis)
            if value < 1 and not (axis == "dp" and value == -1):
                also = " (or -1: the ranks that are left)" if axis == "dp" else ""
                raise UserError(f"layout.{axis}={value}: a degree is at least 1{also}")

    @property
    def edp(self) -> int:
        """Expert data parallel degree of a solved layout."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def world(self) -> int:
        """Ranks that a layout asks for: exactly, or at the least where dp = -1."""
        if self.dp != -1:
            return self.pp * self.dp * self.cp * self.tp
        inner, experts = self.replicate * self.cp * self.tp, self.ep * self.etp
        return self.pp * math.lcm(inner, experts)

    def solve(self, world: int) -> "Layout":
        """Fill in ``dp`` and check that both views tile the world exactly; raises ``UserError`` with the numbers."""
        rest = self.pp * self.cp * self.tp
        if self.dp == -1 and world % rest:
            raise UserError(
                f"layout pp*cp*tp = {self.pp}*{self.cp}*{self.tp} = {rest} does not divide the {world} ranks there "
                f"are: start a multiple of {rest} ranks or lower pp, cp or tp"
            )
        dp = world // rest if self.dp == -1 else self.dp
        if rest * dp != world:
            raise UserError(
                f"layout pp*dp*cp*tp = {self.pp}*{dp}*{self.cp}*{self.tp} = {rest * dp} does not equal the {world} "
                f"ranks there are: start {rest * dp} ranks or set layout.dp=-1"
            )
        experts = self.pp * self.ep * self.etp
        if world % experts:
            raise UserError(
                f"layout pp*ep*etp = {self.pp}*{self.ep}*{self.etp} = {experts} does not divide the {world} ranks "
                f"there are: ep*etp has to divide dp*cp*tp = {dp * self.cp * self.tp}"
            )
        if dp % self.replicate:
            raise UserError(
                f"layout.replicate={self.replicate} does not divide dp={dp}: each copy of the weights takes a whole "
                f"number of data-parallel ranks"
            )
        return replace(self, dp=dp)

    def __str__(self) -> str:
        copies = f" replicate{self.replicate}" if self.replicate > 1 else ""
        return " ".join(f"{axis}{getattr(self, axis)}" for axis in AXES) + f" edp{self.edp}" + copies


def views(layout: Layout) -> dict[str, dict[str, int]]:
    """Name -> axis -> size of a solved layout, outermost first. Pure arithmetic, testable without any process."""
    n, copies = layout, math.gcd(layout.replicate, layout.edp)
    return {
        "dense": {"pp": n.pp, "dp": n.dp, "cp": n.cp, "tp": n.tp},
        "moe": {"pp": n.pp, "edp": n.edp, "ep": n.ep, "etp": n.etp},
        "fsdp": {"pp": n.pp, "replicate": n.replicate, "shard": n.dp * n.cp // n.replicate, "tp": n.tp},
        "experts": {"pp": n.pp, "replicate": copies, "shard": n.edp // copies, "ep_etp": n.ep * n.etp},
    }


def slices(view: dict[str, int], axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Every group of ranks that differ only along ``axes``, in rank order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, at in enumerate(itertools.product(*map(range, view.values()))):
        fixed = tuple(i for i, axis in zip(at, view, strict=True) if axis not in axes)
        groups.setdefault(fixed, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


@dataclass(frozen=True)
class Mesh:
    """A solved layout seen from one rank. Every rank must ask for the same groups in the same order."""

    layout: Layout
    rank: int
    device: torch.device
    _groups: dict[tuple[int, ...], ProcessGroup | None]

    @classmethod
    def build(
        cls, layout: Layout, *, rank: int, world: int, device: torch.device, like: "Mesh | None" = None
    ) -> "Mesh":
        """``like``: another mesh of the same ranks, whose groups are used again."""
        groups: dict[tuple[int, ...], ProcessGroup | None] = {} if like is None else like._groups
        if world > 1:
            groups[tuple(range(world))] = dist.distributed_c10d._get_default_group()
        return cls(layout.solve(world), rank, device, groups)

    @property
    def world(self) -> int:
        return self.layout.world

    def group(self, view: str, *axes: str) -> ProcessGroup | None:
        """This rank's group along ``axes`` of a view; None where it would hold one rank. Collective the first time."""
        mine = None
        for ranks in slices(views(self.layout)[view], axes):
            if len(ranks) > 1 and ranks not in self._groups:
                group = dist.new_group(list(ranks))
                self._groups[ranks] = group if isinstance(group, ProcessGroup) else None  # a number: not a member
            if self.rank in ranks:
                mine = self._groups.get(ranks)
        return mine

    def storage(self, view: str) -> DeviceMesh | None:
        """The replicate x shard axes of a storage view as FSDP2 wants them; None where one rank would hold both."""
        sizes = views(self.layout)[view]
        if sizes["replicate"] == 1:
            group = self.group(view, "shard")
            return None if group is None else DeviceMesh.from_group(group, self.device.type, mesh_dim_names=("shard",))
        pair = [self.group(view, axis) or self._alone() for axis in ("replicate", "shard")]
        mine = next(ranks for ranks in slices(sizes, ("replicate", "shard")) if self.rank in ranks)
        return DeviceMesh.from_group(
            pair, self.device.type, mesh=torch.tensor(mine).view(sizes["replicate"], sizes["shard"]),
            mesh_dim_names=("replicate", "shard"),
        )  # fmt: skip

    def _alone(self) -> ProcessGroup:
        """A group of this rank only, for an axis that a DeviceMesh cannot do without."""
        if (self.rank,) not in self._groups:
            group = dist.new_group([self.rank], use_local_synchronization=True)
            self._groups[(self.rank,)] = group if isinstance(group, ProcessGroup) else None
        group = self._groups[(self.rank,)]
        assert group is not None
        return group

    def index(self, view: str, *axes: str) -> int:
        """Where this rank stands along ``axes`` of a view, row-major."""
        sizes = views(self.layout)[view]
        coordinate, rest = {}, self.rank
        for axis in reversed(sizes):
            rest, coordinate[axis] = divmod(rest, sizes[axis])
        at = 0
        for axis in axes:
            at = at * sizes[axis] + coordinate[axis]
        return at
