"""Known bugs, planted on purpose: what ``moetrain verify --inject`` has to catch.

Each is one that a trainer has had, or that is a slip away: a group mixed up, a division too many, a part left out of a
sum. They are planted from outside, by replacing a function in the ranks of the run that is verified: the product has no
line for them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from moetrain import comm, deferred, train
from moetrain.config import UserError, nearest
from moetrain.job import Config
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.model import attention, loss
from moetrain.model.attention import QKNorm
from moetrain.model.layers import RMSNorm, Rope
from moetrain.moe import layer, travel
from moetrain.moe.balance.expert_bias import ExpertBias
from moetrain.moe.balance.sequence import Sequence
from moetrain.moe.balance.switch import Switch
from moetrain.moe.dispatchers import capacity
from moetrain.optim import Kind
from moetrain.parallel import state
from moetrain.parallel.context import Part
from moetrain.parallel.plan import Held

Swaps = list[tuple[Any, str, Any]]


@dataclass(frozen=True)
class Fault:
    """``words`` says the bug; ``needs`` what a layout and config must have for it to show, in words, or None;
    ``swaps`` the (owner, attribute, replacement) that plant it."""

    words: str
    needs: Callable[[Config, Layout], str | None]
    swaps: Callable[[], Swaps]


FAULTS: dict[str, Fault] = {}


def require(name: str, cfg: Config, layout: Layout) -> None:
    """Raise ``UserError`` for an unknown fault, or one that this (shrunk) config and solved layout cannot show."""
    if name not in FAULTS:
        raise UserError(f"--inject {name}: no such fault{nearest(name, FAULTS)} (there are: {', '.join(FAULTS)})")
    if why := FAULTS[name].needs(cfg, layout):
        raise UserError(f"--inject {name} needs {why}: layout {layout} cannot show it")


@contextlib.contextmanager
def plant(name: str) -> Iterator[None]:
    """The bug is in this process while the context is open."""
    swaps = FAULTS[name].swaps()
    before = [vars(owner)[attribute] for owner, attribute, _ in swaps]
    for owner, attribute, new in swaps:
        setattr(owner, attribute, new)
    try:
        yield
    finally:
        for (owner, attribute, _), old in zip(swaps, before, strict=True):
            setattr(owner, attribute, old)


def _fault(words: str, needs: Callable[[Config, Layout], str | None]):
    def add(swaps: Callable[[], Swaps]):
        FAULTS[swaps.__name__] = Fault(words, needs, swaps)
        return swaps

    return add


def _if(words: str, has: Callable[[Config, Layout], bool]) -> Callable[[Config, Layout], str | None]:
    return lambda cfg, layout: None if has(cfg, layout) else words


def _balanced(cfg: Config, *kinds: type) -> bool:
    return bool(cfg.model.moe_layers) and any(isinstance(term, kinds) for term in cfg.model.moe.balance.values())


def _travels(cfg: Config) -> bool:
    return bool(cfg.model.moe_layers) and cfg.model.moe.placement.travels


_TRAVEL = _if("placement=fssdp, shadow or replicate_all, edp*ep > 1", lambda cfg, n: _travels(cfg) and n.edp * n.ep > 1)
_COPIES = _if("edp > 1, placement=static", lambda cfg, n: n.edp > 1 and not _travels(cfg))
_TP = _if("tp > 1", lambda cfg, n: n.tp > 1)
_CP = _if("cp > 1", lambda cfg, n: n.cp > 1)
_SHARDED = _if("dp*cp > 1", lambda cfg, n: n.dp * n.cp > 1)


@_fault(
    "experts' gradients are summed over the dense data-parallel ranks (Megatron-LM #1628)",
    _if("dp*cp > 1, ep > 1, placement=static", lambda cfg, n: n.dp * n.cp > 1 and n.ep > 1 and not _travels(cfg)),
)
def experts_over_dense_ranks() -> Swaps:
    update = train.Trainer._update

    def wrong(self, loss, seen, **more):
        for name, p in self.model.named_parameters():
            if ".experts." in name and p.grad is not None:
                comm.all_reduce_(state.local(p.grad), group=self.mesh.group("dense", "dp", "cp"))
        return update(self, loss, seen, **more)

    return [(train.Trainer, "_update", wrong)]


@_fault("the copies of an expert keep their own gradients", _COPIES)
def experts_not_summed() -> Swaps:
    storage = Mesh.storage
    return [(Mesh, "storage", lambda self, view: None if view == "experts" else storage(self, view))]


@_fault("sharded gradients are averaged, although the loss is divided already (PyTorch #160285)", _SHARDED)
def double_division() -> Swaps:
    divide = FSDPModule.set_gradient_divide_factor

    def wrong(self, factor):
        group = self._get_fsdp_state()._fsdp_param_group
        divide(self, factor if group is None else float(group._reduce_scatter_process_group.size()))

    return [(FSDPModule, "set_gradient_divide_factor", wrong)]


@_fault(
    "the gradient norm leaves the experts out (Megatron-LM #5916)",
    _if("MoE layers", lambda cfg, n: bool(cfg.model.moe_layers)),
)
def norm_without_experts() -> Swaps:
    counted = Held.counted.fget  # pyright: ignore[reportFunctionMemberAccess]
    return [(Held, "counted", property(lambda self: self.ids is None and counted(self)))]  # pyright: ignore


@_fault(
    "the gradient norm counts every copy (torchtitan #2318)",
    _if("tp > 1 or replicate > 1", lambda cfg, n: n.tp > 1 or n.replicate > 1),
)
def norm_counts_copies() -> Swaps:
    return [(Held, "counted", property(lambda self: True))]


@_fault("gradients of what tp ranks hold alike are summed twice", _TP)
def copies_summed_twice() -> Swaps:
    once = state.sum_copies_

    def wrong(grads, plan):
        once(grads, plan)
        once(grads, plan)

    return [(state, "sum_copies_", wrong)]


@_fault("gradients of what tp ranks hold alike are not summed", _TP)
def copies_not_summed() -> Swaps:
    return [(state, "sum_copies_", lambda grads, plan: None)]


@_fault(
    "key heads that several tp ranks hold are not summed",
    _if("tp > num_kv_heads", lambda cfg, n: n.tp > cfg.model.num_kv_heads),
)
def key_heads_not_summed() -> Swaps:
    right = state.sum_copies_

    def wrong(grads, plan):
        right({n: g for n, g in grads.items() if ".attention.k." not in n and ".attention.v." not in n}, plan)

    return [(state, "sum_copies_", wrong)]


@_fault(
    "the balance loss weighs more the more ranks there are (Megatron-LM #3672)",
    _if("two ranks and a balance loss", lambda cfg, n: n.world > 1 and _balanced(cfg, Switch, Sequence)),
)
def balance_times_world() -> Swaps:
    attach = layer.attach

    def wrong(y, loss, *, weight):
        return attach(y, loss, weight=weight * torch.distributed.get_world_size())

    return [(layer, "attach", wrong)]


@_fault(
    "a balance loss counts only this rank's part of a sequence (Megatron-LM #1652)",
    _if("cp*tp > 1 and a balance loss", lambda cfg, n: n.cp * n.tp > 1 and _balanced(cfg, Switch, Sequence)),
)
def balance_counts_locally() -> Swaps:
    right = layer.MoE._balance

    def wrong(self, y_TD, routing, tokens, ctx):
        return right(self, y_TD, routing, replace(tokens, group=None), ctx)

    return [(layer.MoE, "_balance", wrong)]


@_fault("rotary positions begin at 0 on every context rank", _CP)
def positions_restart() -> Swaps:
    right = Rope.forward
    return [
        (Rope, "forward", lambda self, position_S: right(self, torch.arange(len(position_S), device=position_S.device)))
    ]


@_fault("gathered keys stay in the order of ranks, not of positions", _CP)
def keys_out_of_order() -> Swaps:
    return [(attention, "_in_order", lambda x, cp: x)]


@_fault(
    "padding is routed, counted and dropped like tokens",
    _if(
        "a train.seq_len that cp and tp have to pad",
        lambda cfg, n: cfg.train.seq_len % (2 * n.cp * n.tp if n.cp > 1 else n.tp) > 0,
    ),
)
def padding_counted() -> Swaps:
    return [(Part, "mask", lambda self, rows, *, batch: None)]


@_fault(
    "the loss is divided by each micro-batch's own targets",
    _if("masked documents or ignored tokens", lambda cfg, n: cfg.data.mask_documents or bool(cfg.data.ignore_tokens)),
)
def local_divisor() -> Swaps:
    right = train.Trainer.forward

    def wrong(self, m, first, **rest):
        t = self.cfg.train
        own = self.data.loader.num_targets(first, t.micro_batch) * t.batch // t.micro_batch
        return right(self, m, first, **rest | {"targets": own})

    return [(train.Trainer, "forward", wrong)]


@_fault(
    "the expert bias follows this rank's load",
    _if("two ranks and balance=[expert_bias]", lambda cfg, n: n.world > 1 and _balanced(cfg, ExpertBias)),
)
def bias_from_local_load() -> Swaps:
    right = layer.MoE.end_step
    return [(layer.MoE, "end_step", lambda self, load_E, **rest: right(self, self.load_ME.sum(0), **rest))]


@_fault("the parts of an expert's result are averaged", _if("etp > 1", lambda cfg, n: n.etp > 1))
def expert_parts_averaged() -> Swaps:
    right = layer.Experts.forward
    return [(layer.Experts, "forward", lambda self, *given: right(self, *given) / 2)]


@_fault("weights at step 0 depend on the rank", _if("two ranks", lambda cfg, n: n.world > 1))
def weights_by_rank() -> Swaps:
    right = train.initialize

    def wrong(tensors, cfg, *, seed):
        right(tensors, cfg, seed=seed + torch.distributed.get_rank())

    return [(train, "initialize", wrong)]


@_fault(
    "Muon's updates are orthogonal shard by shard, not as whole matrices",
    _if("optim.kind=muon and two ranks", lambda cfg, n: n.world > 1 and cfg.optim.kind is Kind.muon),
)
def muon_by_shard() -> Swaps:
    right = train.Optimizer
    return [(train, "Optimizer", lambda cfg, params, **rest: right(cfg, params))]


@_fault("every data-parallel rank reads the same samples", _if("dp > 1", lambda cfg, n: n.dp > 1))
def same_samples() -> Swaps:
    right = train.Trainer.forward

    def wrong(self, m, first, **rest):
        share = self.cfg.train.batch // self.mesh.layout.dp
        return right(self, m, first - self.mesh.index("dense", "dp") * share, **rest)

    return [(train.Trainer, "forward", wrong)]


@_fault("the softmax of the head sees this rank's slice of the vocabulary only", _TP)
def vocabulary_normalized_locally() -> Swaps:
    class Alone:
        all_reduce_ = staticmethod(lambda x, *, group, op=None: x)

        def __getattr__(self, name):
            return getattr(comm, name)

    return [(loss, "comm", Alone())]


@_fault(
    "a QK-norm over all heads normalizes each rank's heads alone",
    _if("tp > 1 and qk_norm=full", lambda cfg, n: n.tp > 1 and cfg.model.qk_norm is QKNorm.full),
)
def qk_norm_per_rank() -> Swaps:
    return [(RMSNorm, "group", property(lambda self: None, lambda self, group: None))]


@_fault(
    "capacity is counted on each rank's part of a sequence",
    _if(
        "cp*tp > 1 and a capacity that drops",
        lambda cfg, n: n.cp * n.tp > 1 and isinstance(cfg.model.moe.dispatcher, capacity.Capacity),
    ),
)
def capacity_per_rank() -> Swaps:
    right = capacity._of_sequence
    return [(capacity, "_of_sequence", lambda chosen_TE, tokens: (None, right(chosen_TE, tokens)[1]))]


@_fault(
    "the gradient norm is that of a stage, not of all",
    _if("pp > 1 and a clip", lambda cfg, n: n.pp > 1 and cfg.optim.clip > 0),
)
def norm_of_a_stage() -> Swaps:
    right = train.Trainer._update

    def wrong(self, loss, seen, **more):
        stage, both = self.mesh.group("moe", "edp", "ep", "etp"), train.norm_and_sum
        train.norm_and_sum = lambda grads, x, *, group: both(grads, x, group=stage)
        try:
            return right(self, loss, seen, **more)
        finally:
            train.norm_and_sum = both

    return [(train.Trainer, "_update", wrong)]


@_fault(
    "a backward in two parts counts the balance loss in both",
    _if(
        "pp > 1, a schedule that splits backwards and a balance loss",
        lambda cfg, n: n.pp > 1 and cfg.pipeline.order.splits_backward and _balanced(cfg, Switch, Sequence),
    ),
)
def balance_in_both_backwards() -> Swaps:
    attach = layer.attach
    return [(layer, "attach", lambda y, loss, *, weight: attach(y, loss, weight=weight * (1 + deferred._recording)))]


@_fault(
    "a tied embedding's gradients at the two ends of a pipeline are not summed",
    _if(
        "pp > 1, tied embeddings, the ends on two ranks",
        lambda cfg, n: n.pp > 1 and cfg.model.tie_embeddings and not cfg.pipeline.order.is_v,
    ),
)
def tied_ends_not_summed() -> Swaps:
    right = state.sum_copies_

    def wrong(grads, plan):
        right({n: g for n, g in grads.items() if n != "embedding.weight"}, plan)

    return [(state, "sum_copies_", wrong)]


@_fault(
    "gradients of earlier micro-batches are lost",
    _if(
        "accumulation over two micro-batches",
        lambda cfg, n: cfg.train.batch > n.dp * cfg.train.micro_batch,
    ),
)
def only_the_last_micro_batch() -> Swaps:
    right = train.Trainer.forward

    def wrong(self, m, first, **rest):
        found = right(self, m, first, **rest)
        last = self.cfg.train.batch // self.mesh.layout.dp // self.cfg.train.micro_batch - 1
        if m == last or not isinstance(found, torch.Tensor):
            return found
        return found.detach() + 0.0 * found

    return [(train.Trainer, "forward", wrong)]


@_fault("gradients that come back from replicas are left out", _TRAVEL)
def replicas_not_summed() -> Swaps:
    return [(travel.Trip, "rounds", property(lambda self: []))]


@_fault("replicas arrive in another order than that of their slots", _TRAVEL)
def replicas_out_of_order() -> Swaps:
    right = travel.Replicas._arrive

    def wrong(self):
        arrived, away = self._work is not None, self._flat.data[self.trip.owned : self.trip.slots]
        right(self)
        if arrived:
            away.copy_(away.flip(0))

    return [(travel.Replicas, "_arrive", wrong)]
