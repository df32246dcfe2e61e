"""Data parallelism by FSDP2: experts over edp, everything else over dp*cp; every reduction is a plain SUM."""

import itertools
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import Shard

from moetrain import comm, world
from moetrain.config import UserError, config
from moetrain.layouts import views
from moetrain.mesh import Mesh
from moetrain.model.transformer import Stage, Transformer


class Accumulate(Enum):
    local = "local"  # unsharded gradients until the last micro-batch, one reduction a step
    sharded = "sharded"  # reduce-scatter after every micro-batch, the least memory


@config
class ShardingConfig:
    """ZeRO level (arXiv 1910.02054) of dense weights and of experts: 3 frees weights after forward, 2 keeps them."""

    dense: int = 3
    experts: int = 3
    accumulate: Accumulate = Accumulate.local

    def __post_init__(self) -> None:
        for name in ("dense", "experts"):
            level = getattr(self, name)
            if level not in (2, 3):
                raise UserError(f"sharding.{name}={level}: levels are 2 (gradients and optimizer) and 3 (weights too)")


def shard(model: Transformer, mesh: Mesh, *, sharding: ShardingConfig, dtype: torch.dtype) -> None:
    """Wrap experts, blocks and the rest in FSDP2 units. Axes of one rank make no unit."""
    dense, experts = mesh.storage("fsdp"), mesh.storage("experts")
    low = dtype not in (torch.float32, torch.float64)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if low else None, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
    )
    unsharded: set[nn.Parameter] = set()
    for layer in model.moe_layers():
        if experts is None or model.cfg.moe.placement.travels:
            unsharded |= set(layer.experts.parameters())
        else:
            fully_shard(
                layer.experts, mesh=experts, mp_policy=policy, reshard_after_forward=sharding.experts == 3,
                shard_placement_fn=_expert_dim(experts.size(-1)),
            )  # fmt: skip
    if dense is not None:
        tied = model.cfg.tie_embeddings  # one, used at both ends: the root's
        ends = [] if tied else [end for end in (model.embedding, model.head) if end is not None]
        for unit in (*ends, *model.blocks.values(), model):
            fully_shard(
                unit, mesh=dense, mp_policy=policy, ignored_params=unsharded,
                reshard_after_forward=sharding.dense == 3 and unit not in (model, model.head),
            )  # fmt: skip
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM, and the loss is divided already
            if world.on_cpu(mesh.device):  # nothing overlaps here: hold no more than what is being computed
                module.set_modules_to_backward_prefetch([module])
                module.set_custom_all_gather(_AllGather())
                module.set_custom_reduce_scatter(_ReduceScatter())
    if not world.on_cpu(mesh.device) and mesh.layout.pp > 1:
        if isinstance(model, FSDPModule):
            model.set_modules_to_backward_prefetch([model])
        for stage in model.stages:
            _prefetch_along(stage, model)


def keep_in(model: Transformer, dtype: torch.dtype) -> None:
    """Weights alone, while the model is on meta: buffers stay what they are."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def sum_in(model: Transformer, dtype: torch.dtype) -> None:
    """Gradients are added up, reduced and handed over in ``dtype``, where weights are kept in less."""
    for p in model.parameters():
        p.grad_dtype = dtype
    for unit in model.modules():
        for group in param_groups(unit) if isinstance(unit, FSDPModule) else ():
            group._init_mp_dtypes = partial(_hand_over_in, dtype, group, group._init_mp_dtypes)


def _hand_over_in(dtype: torch.dtype, group: Any, found_out: Callable[[], None]) -> None:
    """FSDP2 would round what it has reduced to the weights' dtype."""
    found_out()
    group._orig_dtype = dtype


class _Allocates:
    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Allocates, AllGather):
    """One whose place is known (``where.py``)."""

    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False) -> None:
        comm.all_gather_into(output_tensor, input_tensor, group=group)


class _ReduceScatter(_Allocates, ReduceScatter):
    """FSDP2 keeps a unit's reduce-scatter input until the next unit's backward; gloo is done with it at once."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op: bool = False) -> None:
        comm.reduce_scatter_into(output_tensor, input_tensor, group=group, op=op)  # pyright: ignore[reportArgumentType]
        input_tensor.untyped_storage().resize_(0)


def summed(name: str, model: Transformer, mesh: Mesh) -> dict[str, str | int]:
    """What FSDP2 does with a parameter, in the words of its ``Held``: the axes it sums over, the copy of this rank."""
    if ".moe.experts." in name and model.cfg.moe.placement.travels:
        return {}
    view, axes = ("experts", "edp") if ".moe.experts." in name else ("fsdp", "dp*cp")
    sizes = views(mesh.layout)[view]
    many = sizes["replicate"] * sizes["shard"] > 1
    return {"fsdp": axes if many else "", "replica": mesh.index(view, "replicate")}


def reshard(model: Transformer) -> None:
    """After a forward that no backward follows: units that wait for one are put back into shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_last_micro_batch(model: Transformer, last: bool, *, sharding: ShardingConfig) -> None:
    """Say before each forward whether this micro-batch's backward is the step's last."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last or sharding.accumulate is Accumulate.sharded, recurse=False)
            module.set_requires_all_reduce(last, recurse=False)  # of HSDP's copies: once a step
            module.set_is_last_backward(last)


class Units:
    """The FSDP units of a pipeline rank during a step: gradients are reduced when a stage says so, not by a backward.

    A backward cannot know: several micro-batches are on their way, and weight gradients may come later than it. Under
    level 2 weights stay gathered until the stage's last backward.
    """

    def __init__(self, model: Transformer, *, sharding: ShardingConfig) -> None:
        self.model, self.sharded = model, sharding.accumulate is Accumulate.sharded
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        experts = {id(layer.experts) for layer in model.moe_layers()}
        for unit in self.units:
            level = sharding.experts if id(unit) in experts else sharding.dense
            unit.set_is_last_backward(False)
            unit.set_requires_gradient_sync(False, recurse=False)
            unit.set_reshard_after_backward(level == 3, recurse=False)

    def reshard(self, stage: Stage) -> None:
        """A backward of a stage has ended; what has an input without a gradient, FSDP2 does not hear of that."""
        for unit in itertools.chain(*_parts(stage, self.model)):
            for group in param_groups(unit):
                if group.reshard_after_backward:
                    group.reshard()

    def reduce(self, stage: Stage, last: bool) -> None:
        """A micro-batch's gradients of a stage are whole; ``last``: of the step."""
        for unit in itertools.chain(*_parts(stage, self.model)):
            if last or self.sharded:
                self._reduce(unit, last)
            else:
                _add_up(unit)

    def finish(self) -> None:
        """After the last stage's: the root's, and wait for all."""
        for unit in self.units:
            self._reduce(unit, True)
        for unit in self.units:
            state = unit._get_fsdp_state()
            unit.set_is_last_backward(True)
            if state._is_root:
                state._root_post_backward_final_callback()

    def _reduce(self, unit: FSDPModule, last: bool) -> None:
        unit.set_requires_gradient_sync(True, recurse=False)
        unit.set_requires_all_reduce(last, recurse=False)  # of HSDP's copies: once a step
        if last:
            unit.set_reshard_after_backward(True, recurse=False)
        for group in param_groups(unit):
            group.post_backward()
        unit.set_requires_gradient_sync(False, recurse=False)


def _prefetch_along(stage: Stage, model: Transformer) -> None:
    """Gather a stage's next unit early: FSDP2's own guess is the order of the last forward, of any micro-batch."""
    parts = _parts(stage, model)
    forward, backward = ([unit for part in several for unit in part] for several in (parts, reversed(parts)))
    for unit, after in itertools.pairwise(forward):
        unit.set_modules_to_forward_prefetch([after])
    for unit, after in itertools.pairwise([*backward, *backward[-1:]]):  # the last none
        unit.set_modules_to_backward_prefetch([after])


def _parts(stage: Stage, model: Transformer) -> list[list[FSDPModule]]:
    """Units of the embedding, of each block, of the head; one that is tied is the root's, which is no stage's."""
    parts: list[Any] = [model.blocks[str(i)] for i in stage.layers]
    if not model.cfg.tie_embeddings:
        parts = [*[model.embedding] * stage.first, *parts, *[model.head] * stage.last]
    return [[module for module in part.modules() if isinstance(module, FSDPModule)] for part in parts]


def _add_up(unit: FSDPModule) -> None:
    """Move a micro-batch's gradients to where they are added in the dtype of the reduction."""
    for group in param_groups(unit):
        for p in group.fsdp_params:
            if hasattr(p, "_unsharded_param"):
                p.accumulate_unsharded_grad_if_needed()
                p.to_accumulated_grad_if_needed()


def param_groups(unit: FSDPModule) -> list:
    state = unit._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; before it, one or none
    return several if several is not None else [g for g in [state._fsdp_param_group] if g is not None]


def _expert_dim(ranks: int):
    """Whole experts where they divide evenly, else slices of each: never everything on the first rank."""

    def placement(p: nn.Parameter) -> Shard:
        if p.shape[0] % ranks == 0:
            return Shard(0)
        hidden = 2 if p.dim() == 4 else p.dim() - 1
        return Shard(hidden if p.shape[hidden] % ranks == 0 else 0)  # FSDP2 wants even cuts on later dims

    return placement
