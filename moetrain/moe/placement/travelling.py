"""What policies share whose experts travel: their fields, their slots, and the checks before the first step."""

import math
from dataclasses import field, fields

import numpy as np
import torch
from torch import Tensor

from moetrain.config import UserError, config
from moetrain.logical import DTypeName
from moetrain.moe.placement.cost import Bools, Ints
from moetrain.moe.placement.types import Grid, Placement, PlacementPolicy
from moetrain.moe.types import LayoutDependence

GiB = 2**30


class Wire(DTypeName):
    """What replicas' gradients travel in; their owners sum them in the weights' dtype."""

    bfloat16 = "bfloat16"


@config
class Travelling(PlacementPolicy):
    """Gradients of replicas travel as ``wire``, null = as they come: what is computed in, where micro-batches have been
    added up the weights' dtype."""

    wire: Wire | None = None

    @property
    def travels(self) -> bool:
        return True

    @property
    def depends_on_layout(self) -> LayoutDependence | None:
        if self.wire is None:
            return None
        return LayoutDependence(
            "model.moe.placement.wire=bfloat16 rounds the gradients of replicas, of which each layout has others",
            axes=("dp", "cp", "tp", "ep"), instead="model.moe.placement.wire=null",
        )  # fmt: skip


@config
class PinnedCosts:
    """See ``Costs``, microseconds; null = measured in the run's second to fourth step."""

    row: float | None = None
    hop: float | None = None
    expert: float | None = None
    hidden: float | None = None
    shared: float | None = None  # ranks; where all others are pinned, null = 1

    @property
    def values(self) -> dict[str, float | None]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if value is not None and not 0 <= value < math.inf:
                raise UserError(
                    f"model.moe.placement.costs.{name}={value}: microseconds have to be 0 or more and finite, null = "
                    f"measured"
                )


@config
class Following(Travelling):
    """Replicas follow the load, averaged over the last ``window`` steps, into ``memory`` GiB of a rank (null: any)."""

    window: int = 5
    costs: PinnedCosts = field(default_factory=PinnedCosts)
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(
                f"model.moe.placement.window={self.window}: replicas follow the load averaged over so many steps, "
                f"use 1 or more"
            )
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise UserError(
                f"model.moe.placement.memory={self.memory}: the GiB that a rank may use for replicas have to be above "
                f"0 and finite, null = any"
            )


def place(holds_RE: Bools, owner_E: Ints, grid: Grid, *, span: int) -> Placement:
    """(R, E) who holds what -> the placement: a rank's own experts by id, then its replicas by (owner, id)."""
    R, order_E = len(holds_RE), owner_E.argsort(kind="stable")
    rank_X, place_X = holds_RE[:, order_E].nonzero()  # by (rank, owner, expert)
    expert_X = order_E[place_X]
    home_X = owner_E[expert_X]
    count_R, own_R = np.bincount(rank_X, minlength=R), np.bincount(owner_E, minlength=R)
    earlier_R = np.bincount(rank_X[home_X < rank_X], minlength=R)  # replicas that its own experts move in front of
    ahead_X = np.where(home_X < rank_X, own_R[rank_X], np.where(home_X == rank_X, -earlier_R[rank_X], 0))
    slots_RS = np.full((R, int(count_R.max())), -1)
    slots_RS[rank_X, np.arange(len(rank_X)) - (count_R.cumsum() - count_R)[rank_X] + ahead_X] = expert_X
    return Placement(torch.from_numpy(slots_RS), torch.from_numpy(owner_E), span=span, node=grid.node)


def check(grid: Grid, experts: list[int], policy: PlacementPolicy) -> None:
    """The experts of each MoE layer of a stage: where they travel, every rank has to own one."""
    if policy.travels and 0 < sum(experts) < grid.ranks:
        raise UserError(
            f"the {sum(experts)} experts of a stage's {len(experts)} MoE layers are fewer than its edp*ep={grid.ranks} "
            f"ranks, each of which owns at least one where experts travel: lower layout.dp, layout.cp or layout.tp, or "
            f"set placement=static"
        )


def room(policy: PlacementPolicy, one_each: int, layers: int) -> int | None:
    """Replicas of a layer that a rank has memory for, where one in each of its layers takes ``one_each`` bytes; None:
    any number."""
    if not isinstance(policy, Following) or policy.memory is None:
        return None
    replicas = int(policy.memory * GiB // max(1, one_each))
    if replicas < 1:
        raise UserError(
            f"model.moe.placement.memory={policy.memory}: one replica in each of a rank's {layers} MoE layers takes "
            f"{one_each / GiB:.3g} GiB with its gradient: give at least that much, null for any, or set "
            f"placement=static"
        )
    return replicas


def check_owners(owners: list[Tensor], experts: list[int], ranks: int) -> None:
    """The owners (E,) of each MoE layer of a stage's experts: all there, on ranks that are there, in equal bytes."""
    if len(owners) != len(experts):
        raise UserError(f"the owner map has {len(owners)} MoE layers where the stage has {len(experts)}: give each")
    for layer, (owner_E, E) in enumerate(zip(owners, experts, strict=True)):
        missing = sorted({*range(E)} - {e for e, r in enumerate(owner_E.tolist()) if r >= 0})
        if missing or len(owner_E) > E:
            what = f"misses experts {missing}" if missing else f"names {len(owner_E)} experts"
            raise UserError(f"the owner map of the stage's MoE layer {layer} {what} of {E}: give each expert one rank")
        if wrong := [(e, r) for e, r in enumerate(owner_E.tolist()) if r >= ranks]:
            raise UserError(
                f"the owner map of the stage's MoE layer {layer} puts expert {wrong[0][0]} on rank {wrong[0][1]}, the "
                f"stage has {ranks} (0 to {ranks - 1}): give one of those"
            )
    count_R = torch.bincount(torch.cat(owners), minlength=ranks) if owners else torch.zeros(ranks)
    most, least = int(count_R.argmax()), int(count_R.argmin())
    if count_R[most] - count_R[least] > 1:
        raise UserError(
            f"the owner map gives rank {most} {int(count_R[most])} experts and rank {least} {int(count_R[least])}: "
            f"ranks own equal bytes, within one expert"
        )
