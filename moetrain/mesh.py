"""The process groups of a layout (``layouts.py``): made once, shared by rank tuple, the same on every rank."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moetrain.layouts import Layout, coordinates, slices, views


@dataclass(frozen=True)
class Mesh:
    """A solved layout seen from one rank. Every rank must ask for the same groups in the same order."""

    layout: Layout
    rank: int
    device: torch.device
    _groups: dict[tuple[tuple[int, ...], str], ProcessGroup | None]
    _timeout: timedelta | None = None

    @classmethod
    def build(
        cls,
        layout: Layout,
        *,
        rank: int,
        world: int,
        device: torch.device,
        timeout: timedelta | None = None,
        like: "Mesh | None" = None,
    ) -> "Mesh":
        """``timeout`` of collectives. ``like``: a mesh of the same ranks, whose groups are used again."""
        groups: dict[tuple[tuple[int, ...], str], ProcessGroup | None] = {} if like is None else like._groups
        if world > 1:
            groups[tuple(range(world)), ""] = dist.distributed_c10d._get_default_group()
        return cls(layout.solve(world), rank, device, groups, timeout)

    @property
    def world(self) -> int:
        return self.layout.world

    def group(self, view: str, *axes: str, use: str = "") -> ProcessGroup | None:
        """This rank's group along ``axes`` of a view; None where it would hold one rank. Collective the first time.

        Groups of the same ranks are one, but for a ``use`` whose collectives are not to wait for others'.
        """
        mine = None
        for ranks in slices(views(self.layout)[view], axes):
            if len(ranks) > 1:
                group = self._made(ranks, use)
                mine = group if self.rank in ranks else mine
        return mine

    def subgroup(self, view: str, axis: str, *, size: int) -> ProcessGroup | None:
        """This rank's run of ``size`` consecutive ranks along an axis; None for one. Collective the first time."""
        mine = None
        for whole in slices(views(self.layout)[view], (axis,)):
            for start in range(0, len(whole) if size > 1 else 0, size):
                group = self._made(whole[start : start + size])
                mine = group if self.rank in whole[start : start + size] else mine
        return mine

    def ends(self, view: str, axis: str) -> ProcessGroup | None:
        """The first and the last rank along an axis; None on a rank between. Collective the first time."""
        mine = None
        for whole in slices(views(self.layout)[view], (axis,)):
            group = self._made((whole[0], whole[-1]))
            mine = group if self.rank in (whole[0], whole[-1]) else mine
        return mine

    def _made(self, ranks: tuple[int, ...], use: str = "") -> ProcessGroup | None:
        """The group of these ranks, made once; None on a rank that is not in it."""
        if (ranks, use) not in self._groups:
            group = dist.new_group(list(ranks), timeout=self._timeout)
            self._groups[ranks, use] = group if isinstance(group, ProcessGroup) else None  # a number: not a member
        return self._groups[ranks, use]

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
        key = ((self.rank,), "")
        if key not in self._groups:
            group = dist.new_group([self.rank], timeout=self._timeout, use_local_synchronization=True)
            self._groups[key] = group if isinstance(group, ProcessGroup) else None
        group = self._groups[key]
        assert group is not None
        return group

    def index(self, view: str, *axes: str) -> int:
        """Where this rank stands along ``axes`` of a view, row-major."""
        sizes = views(self.layout)[view]
        here, at = coordinates(sizes, self.rank), 0
        for axis in axes:
            at = at * sizes[axis] + here[axis]
        return at
