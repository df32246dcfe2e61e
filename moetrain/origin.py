"""Where a step first goes wrong: what every module puts out and every gradient that comes back, noted in order.

    first_not_finite   a step's forwards and backwards once more: the first module, micro-batch and rank that is not
                       finite
    twice              a step's forwards and backwards two times: the first place where the bits differ, which they
                       never do on machines that compute what they are told
    copies             weights and optimizer state that several ranks hold alike, compared by their bits

Before a collective only the rank that is to blame is wrong, after it all are: so the first place tells who it was.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moetrain.checkpoint import Wire
from moetrain.parallel import state
from moetrain.where import here

if TYPE_CHECKING:
    from moetrain.train import Trainer

_PHASES = "forward", "backward", "gradient of the step"
_PIECE = 2**22
"""Elements that are hashed at a time."""


@dataclass(order=True, frozen=True)
class Spot:
    """A place in a step; what is wrong at one spoils those after it."""

    micro_batch: int
    phase: int
    depth: int  # from where the phase begins
    order: int  # on its rank
    name: str = field(compare=False)


@dataclass
class Trace:
    """While it is entered, ``note`` of every tensor of floats that a module of a rank puts out, and of its gradient."""

    trainer: "Trainer"
    note: Callable[[Tensor], Tensor]
    found: dict[Spot, Tensor] = field(default_factory=dict)
    _known: set[tuple[int, int, str]] = field(default_factory=set)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Trace":
        for name, module in self.trainer.model.named_modules():
            if name and not isinstance(module, nn.ModuleDict):
                self._handles.append(module.register_forward_hook(partial(self._hook, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        for x in _floats(out):
            m = here.micro_batch
            self.add(m, 0, name, x)
            if x.requires_grad:
                x.register_hook(partial(self._gradient, m, name))

    def _gradient(self, m: int, name: str, g: Tensor) -> None:
        self.add(m, 1, name, g)

    def add(self, micro_batch: int, phase: int, name: str, x: Tensor) -> None:
        """The first time; a forward that is run again in backward is noted once."""
        if (micro_batch, phase, name) in self._known:
            return
        self._known.add((micro_batch, phase, name))
        layers, parts = self.trainer.cfg.model.num_layers, name.split(".")
        at = int(parts[1]) if parts[0] == "blocks" else -1 if parts[0] == "embedding" else layers
        spot = Spot(micro_batch, phase, at if phase == 0 else layers - at, len(self.found), name)
        self.found[spot] = self.note(x.detach())

    def add_gradients(self) -> None:
        """Of the whole step, where they are complete."""
        last = max((spot.micro_batch for spot in self.found), default=0)
        for name, g in state.grads(self.trainer.model).items():
            self.add(last, 2, name, g)

    def spots(self, wrong: Tensor) -> list[Spot]:
        """Those where ``wrong``, (spots,) bool, in order. The host waits."""
        return sorted(spot for spot, is_wrong in zip(self.found, wrong.tolist(), strict=True) if is_wrong)

    def values(self) -> Tensor:
        found = list(self.found.values())
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64, device=self.trainer.world.device)


def first_not_finite(trainer: "Trainer") -> list[str]:
    """Runs the step that the trainer stands before, without an update; nothing where it is finite. Collective."""
    if trainer.mover:
        trainer.mover.begin_step(trainer.steps, trainer.optimizer)
    with Trace(trainer, lambda x: x.isfinite().all()) as trace:
        trainer.gradients()
        trace.add_gradients()
    trainer.model.zero_grad()
    return _first(trainer, trace.spots(~trace.values().bool()))


def twice(trainer: "Trainer", run: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    """What ``run``, a step's forwards and backwards, gives the second time, and where that differs. Collective."""
    traces, loss = [], torch.zeros(())
    for _ in range(2):
        trainer.model.zero_grad()
        if traces and trainer.mover:
            trainer.mover.again()
        with Trace(trainer, bits) as trace:
            loss = run()
            trace.add_gradients()
        traces.append(trace)
    return loss, _first(trainer, traces[0].spots(traces[0].values() != traces[1].values()))


def copies(trainer: "Trainer") -> list[str]:
    """The ranks whose copy of a tensor is not what the other holders have. Collective."""
    mine = {}
    for name, logical in trainer.tensors().items():
        boxes = [[list(chunk.offsets), list(chunk.tensor.shape)] for chunk in logical.chunks]
        if boxes:
            mine[json.dumps([name, boxes])] = torch.stack(
                [bits(chunk.tensor.detach()) for chunk in logical.chunks]
            ).sum()
    found = dict(zip(mine, torch.stack(list(mine.values())).tolist(), strict=True)) if mine else {}
    return Wire(trainer.world.host_group).together(lambda: found, _compare)


def _compare(ranks: list[dict[str, int]]) -> list[str]:
    holders: dict[str, dict[int, int]] = {}
    for rank, found in enumerate(ranks):
        for key, value in found.items():
            holders.setdefault(key, {})[rank] = value
    lines = []
    for key, by_rank in holders.items():
        (value, most), *others = Counter(by_rank.values()).most_common()
        if others:
            odd = [rank for rank, other in by_rank.items() if other != value]
            tie = most == others[0][1]
            who = f"ranks {sorted(by_rank)} do not agree" if tie else f"{_named(odd)}: not what {most} others have"
            lines.append(f"{json.loads(key)[0]} on {who}" if not tie else f"{json.loads(key)[0]}: {who}")
    return lines


def bits(x: Tensor) -> Tensor:
    """() int64 of all bits of a tensor and where they stand; any one that flips changes it."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    flat = x.contiguous().view(whole).flatten()
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].long()
        odd = torch.arange(start, start + piece.numel(), device=x.device) * 2 + 1  # odd: no bit is multiplied away
        total += (piece * odd * odd * odd).sum()
    return total


def _first(trainer: "Trainer", wrong: list[Spot]) -> list[str]:
    """The first wrong spot of all ranks, in words, one line for each rank that is wrong there."""
    mine = [vars(wrong[0]) | {"where": _where(trainer, wrong[0])}] if wrong else []
    return Wire(trainer.world.host_group).together(lambda: mine, _earliest)


def _earliest(ranks: list[list[dict[str, Any]]]) -> list[str]:
    found = [
        (Spot(**{k: v for k, v in s.items() if k != "where"}), s["where"], r) for r, x in enumerate(ranks) for s in x
    ]
    first = min((spot for spot, *_ in found), default=None)
    return [f"{where} on rank {rank}" for spot, where, rank in found if spot == first]


def _where(trainer: "Trainer", spot: Spot) -> str:
    if spot.phase == 2:
        return f"the gradient of {spot.name}"
    first = trainer.first_sample(spot.micro_batch)
    runs = trainer.samples.pieces(first, trainer.cfg.train.micro_batch)
    words = ", ".join(f"{at} to {at + n - 1}" for at, n in runs)
    return f"{spot.name} ({_PHASES[spot.phase]}), micro-batch {spot.micro_batch} (samples {words})"


def _floats(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.is_floating_point() and out.numel():
            yield out
    elif isinstance(out, tuple | list):
        for x in out:
            yield from _floats(x)


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
