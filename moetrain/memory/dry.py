"""A training step of one rank of any world, in this process, on tensors that have shapes and no memory.

The trainer's own code runs: its meshes over a process group whose other ranks do not exist, its model, its step. Three
things differ, all named here: who knows values answers for what the host would read (counts of rows, which are even,
times a factor for those received), tables that the host plans from are real, and weights are not initialized.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.testing._internal.distributed.fake_pg as fake_pg
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain import comm, parallel, train
from moetrain import world as worlds
from moetrain.config import replace
from moetrain.data.loader import Batch
from moetrain.job import Config, Data, check
from moetrain.kernels import grouped, reference
from moetrain.layouts import Layout
from moetrain.memory.ledger import Kind, Ledger, Usage, swapped
from moetrain.memory.repeats import repeating
from moetrain.model import attend
from moetrain.model.attend import Visible
from moetrain.model.transformer import Transformer
from moetrain.moe import rows
from moetrain.moe.placement.travelling import place
from moetrain.moe.placement.types import Costs, Placement
from moetrain.optim import muon
from moetrain.optim.work import Piece
from moetrain.parallel import pipeline, state
from moetrain.parallel.context import Part
from moetrain.parallel.placing import Mover
from moetrain.train import Trainer
from moetrain.world import World


@dataclass(frozen=True)
class Estimate:
    """Bytes of ``rank``, which holds the most of its pipeline stages wherever a split is uneven."""

    stages: list[int]
    layers: list[range]  # of each
    rank: int
    micro_batches: int  # run
    peak: Usage
    between_steps: Usage


def estimate(cfg: Config, *, world: int, at: int = 0, imbalance: float = 1.0, gpu: bool = False) -> Estimate:
    """One step of the first rank of a pipeline's rank ``at``; it receives ``imbalance`` times an even share of rows.
    ``gpu``: by the code that runs on GPUs, with FSDP2's prefetching there.

    Raises ``UserError`` where the config cannot run on ``world`` ranks. This process may not be in a process group.
    """
    cfg = replace(cfg, train=replace(cfg.train, compile=False))  # fake tensors go through what is written
    layout = check(cfg, world=world)
    t = cfg.train
    n = micro_batches(cfg, layout)
    cfg = replace(cfg, train=replace(t, batch=layout.dp * t.micro_batch * n, ramp=type(t.ramp)()))
    rank = at * (world // layout.pp)
    every = pipeline.stages(cfg.model, layout, cfg.pipeline)
    stages = cfg.pipeline.stages_of(at, pp=layout.pp) if layout.pp > 1 else [0]
    with _alone_in(world, rank) as here, contextlib.ExitStack() as stack:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        sent = cfg.model.moe.num_experts / cfg.model.moe.num_choices
        for owner, name, new in _swaps(fake, stack, sent, imbalance, gpu, t.dtype.torch):
            stack.enter_context(swapped(owner, name, new))
        trainer = Trainer(cfg, here, Data({}, Blank(cfg), {}))
        trainer.judge = None  # which would ask for numbers that are not there
        ledger = Ledger()
        hold(ledger, trainer)
        stack.enter_context(swapped(pipeline, "Run", lambda _: repeating(ledger, trainer.model)))
        with ledger:
            trainer.step()
        return Estimate(stages, [every[s].layers for s in stages], rank, n, ledger.peak(), ledger.now())


def micro_batches(cfg: Config, layout: Layout) -> int:
    """How many of a step's micro-batches come by all that the step holds; those left out add nothing.

    Without a pipeline two: the first meets no gradients, the last meets them all and reduces them. In one, so many that
    its schedule has repeated itself.
    """
    real, pp = cfg.train.batch // (layout.dp * cfg.train.micro_batch), layout.pp
    if pp == 1:
        return min(real, 2)
    step = real // max(1, real // pp) if cfg.pipeline.order.is_dealt else 1  # rounds, whose length decides the order
    return min(real, step * -(-_PERIODS * pp // step))


_PERIODS = 4
"""Of ``pp`` micro-batches: by then every schedule repeats itself."""


def hold(ledger: Ledger, trainer: Trainer) -> None:
    """Tell a ledger what a trainer has between steps."""
    ledger.hold(trainer.model.parameters(), Kind.parameters)
    ledger.hold(trainer.model.buffers(), Kind.parameters)
    for storage in trainer.optimizer.state().values():
        ledger.hold(storage.values(), Kind.optimizer)


@contextlib.contextmanager
def _alone_in(world: int, rank: int) -> Iterator[World]:
    """This process as a rank of a world whose other ranks do not exist: collectives return at once."""
    if world > 1:
        dist.init_process_group("fake", rank=rank, world_size=world, store=fake_pg.FakeStore())
    try:
        yield World(rank, world, 0, world, torch.device("cpu"), "fake" if world > 1 else "")
    finally:
        if world > 1:
            dist.destroy_process_group()


def _swaps(
    fake: FakeTensorMode, stack: contextlib.ExitStack, sent: float, imbalance: float, gpu: bool, dtype: torch.dtype
) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    def fakes_from_here(allocate: Callable) -> Callable:
        def wrapped(model: Transformer, device: torch.device) -> None:
            stack.enter_context(fake)  # what comes before needs values: meshes of ranks, FSDP2's cuts
            if dtype is not torch.bfloat16:
                stack.enter_context(_StandIns())
            allocate(model, device)

        return wrapped

    code_of_gpus = [
        (worlds, "on_cpu", lambda _: lambda at: False),
        (attend, "_by_piece", lambda _: _flash),
        (attend, "_by_segment", lambda _: _flash),
    ]
    return (code_of_gpus if gpu else []) + [
        (parallel, "allocate", fakes_from_here),
        (state, "_offsets", lambda offsets: _really(lambda p: list(offsets(p)))),
        (muon, "_tables", lambda _: lambda mine, group, device: [mine] * comm.size(group)),
        (
            muon,
            "batches",
            lambda deal: lambda held, shapes, **known: deal(_tiled(held[0], shapes, ranks=len(held)), shapes, **known),
        ),
        (train, "initialize", lambda _: lambda *args, **kwargs: None),
        (rows, "counts_on_host", lambda _: partial(_counts, sent=sent, imbalance=imbalance)),
        (grouped, "ends_on_host", lambda _: _ends),
        (reference, "ends_on_host", lambda _: _ends),
        (Placement, "target_EJ", _really),
        (Mover, "__init__", _really),
        (Mover, "begin_step", _really),
        (Mover, "end_step", lambda _: lambda mover, load_LE, step: None),
        (Mover, "place", lambda _: _all_there_is_room_for),
        (Part, "documents", _really),
        (Visible, "build", lambda build: classmethod(_really(build.__func__))),
    ]


def _all_there_is_room_for(mover: Mover, load_E: Tensor, owner_E: Tensor, costs: Costs) -> Placement:
    """As many replicas as a policy may ever choose: each rank's are of the experts that come after its own."""
    R, E, most = mover.grid.ranks, len(owner_E), mover.grid.room
    holds_RE = owner_E.numpy() == np.arange(R)[:, None]
    for r in range(R):
        last = int(holds_RE[r].nonzero()[0].max(initial=-1))
        after = [e for e in ((last + 1 + i) % E for i in range(E)) if not holds_RE[r, e]]
        holds_RE[r, after[:most]] = True
    return place(holds_RE, owner_E.numpy(), mover.grid, span=mover.policy.span(mover.grid))


def _flash(q_BHSd: Tensor, k_BGPd: Tensor, v_BGPd: Tensor, visible: Visible) -> Tensor:
    """What a flash kernel makes and saves, whichever keys its queries see."""
    pieces = []
    for q, (_, end) in zip(q_BHSd.chunk(len(visible.pieces), dim=2), visible.pieces, strict=True):
        k, v = k_BGPd[:, :, :end], v_BGPd[:, :, :end]
        pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(pieces, dim=2)


def _counts(*counts: Tensor, num_rows: int, sent: float, imbalance: float) -> list[list[int]]:
    """``sent``: the part of all assignments that zero-computation experts leave to be sent."""
    *on_the_way, arrived = map(len, counts)
    num_rows = round(num_rows * sent)
    return [*(_even(num_rows, n) for n in on_the_way), _even(round(num_rows * imbalance), arrived)]


def _ends(offsets_S: Tensor, *, num_rows: int) -> list[int]:
    slots = len(offsets_S)
    return [num_rows * (slot + 1) // slots for slot in range(slots)]


def _tiled(mine: list[Piece], shapes: list[tuple[int, int, int, int]], *, ranks: int) -> list[list[Piece]]:
    """What each of a group's ranks, the first of which holds ``mine``, has of Muon's matrices: a parameter is tiled
    with boxes like the first rank's, which are dealt in turn."""
    boxes: dict[int, list[Piece]] = {}
    for piece in mine:
        boxes.setdefault(piece[0], []).append(piece)
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for number, first in boxes.items():
        E, *whole = shapes[number]
        units, sizes = [piece[1] for piece in first], first[0][3]
        units += [e for e in range(E) if e not in set(units)]
        runs = [units[i : i + len(first)] for i in range(0, E, len(first))]
        corners = itertools.product(*(range(0, n, step) for n, step in zip(whole, sizes, strict=True)))
        tiles = [(run, corner) for corner in corners for run in runs]
        for rank in range(ranks):
            run, at = tiles[rank % len(tiles)]
            L, R, C = (min(step, n - i) for n, step, i in zip(whole, sizes, at, strict=True))
            l0, r0, c0 = at
            held[rank] += [(number, e, (l0, r0, c0), (L, R, C)) for e in run]
    return held


def _even(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _really(plan: Callable) -> Callable:
    """A function of host tables, whose values it needs."""

    def wrapped(*args: Any, **kwargs: Any):
        with unset_fake_temporarily():
            return plan(*args, **kwargs)

    return wrapped


class _StandIns(TorchDispatchMode):
    """What torch 2.13 has for real tensors only: grouped matmuls in other dtypes than bfloat16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            return _grouped_mm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *_: Any) -> Tensor:
    groups = (len(offs),) if a.dim() == b.dim() == 2 else ()
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


class Blank:
    """Training samples of a run without data: zeros, and where documents are masked, one a row."""

    fingerprint = ""

    def __init__(self, cfg: Config) -> None:
        self._seq_len, self._documents = cfg.train.seq_len, cfg.data.mask_documents

    def batch(self, first: int, count: int) -> Batch:
        shape = (count, self._seq_len)
        tokens_BS, targets_BS = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        documents_BS = None
        if self._documents:
            with unset_fake_temporarily():
                documents_BS = torch.zeros(shape, dtype=torch.int64)
        return Batch(tokens_BS, targets_BS, torch.arange(first, first + count), documents_BS)

    def num_targets(self, first: int, count: int) -> int:
        return count * self._seq_len
