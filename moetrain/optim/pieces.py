"""AdamW by torch's own operations, in pieces that stay in the processor's cache: weights, gradients and averages are
read from memory once and written once, whatever their dtypes. What is computed is float32 or wider:

    m <- m + (1 - beta1) (c g - m)      c: the clip factor; m and v are rounded to nearest as they are stored
    v <- beta2 v + (1 - beta2) (c g)^2
    w <- w (1 - lr decay) - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps sqrt(1 - beta2^t))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain import world
from moetrain.optim import rounding
from moetrain.optim.config import OptimConfig
from moetrain.optim.rounding import Run

_ON_CPU = 2**16
"""Elements a thread has of a piece: five buffers of them are less than a core's cache."""
_ON_GPU = 2**22
"""There every operation is a kernel's start; this bounds what a step takes to some 150 MiB."""


@dataclass(frozen=True)
class Part:
    name: str
    run: Run
    at: int  # where it begins in a piece's buffers


@dataclass(frozen=True)
class Constants:
    """Of one step; tensors where they depend on what only the device knows."""

    decay: float  # what weights that decay are multiplied by
    size: float | Tensor
    eps: float | Tensor

    @classmethod
    def of(cls, cfg: OptimConfig, *, lr: float, steps: int | Tensor) -> "Constants":
        """``steps``: updates so far, this one included."""
        root = (1 - cfg.beta2**steps) ** 0.5
        return cls(1 - lr * cfg.weight_decay, lr * root / (1 - cfg.beta1**steps), cfg.eps * root)


class Pieces:
    """``weights`` and what ``averages`` holds: names -> contiguous storage, of which ``runs`` are updated."""

    def __init__(
        self, cfg: OptimConfig, weights: dict[str, Tensor], averages: dict[str, dict[str, Tensor]],
        runs: dict[str, list[Run]], *, decays: Callable[[str], bool],
    ) -> None:  # fmt: skip
        self.cfg, self.weights, self.averages = cfg, weights, averages
        self.decays, device = decays, next(iter(weights.values())).device
        self.most = _ON_CPU * torch.get_num_threads() if world.on_cpu(device) else _ON_GPU
        self.pieces = [piece for decayed in (True, False) for piece in self._cut(runs, decayed)]
        self.longest = max((parts[-1].at + parts[-1].run.numel for parts in self.pieces), default=0)

    def _cut(self, runs: dict[str, list[Run]], decayed: bool) -> list[list[Part]]:
        found: list[list[Part]] = [[]]
        filled = 0
        for name in (name for name in runs if self.decays(name) == decayed):
            for run in (part for whole in runs[name] for part in whole.cut(self.most)):
                if filled + run.numel > self.most:
                    found.append([])
                    filled = 0
                found[-1].append(Part(name, run, filled))
                filled += run.numel
        return [piece for piece in found if piece]

    def step(
        self, grads: dict[str, Tensor], constants: Constants, *, scale: Tensor | None, skip: Tensor | None,
        keys: dict[str, int],
    ) -> None:  # fmt: skip
        """``keys``: of the parameters that are rounded stochastically; where ``skip`` is true, nothing changes."""
        first = next(iter(grads.values()))
        wide = torch.promote_types(first.dtype, torch.float32)
        rooms = [torch.empty(self.longest, dtype=wide, device=first.device) for _ in range(4)]
        drawn = torch.empty(self.longest if keys else 0, dtype=torch.int16, device=first.device)
        scale = None if scale is None else scale.to(wide)
        storages = [self.weights, {n: g.contiguous() for n, g in grads.items()}, *self.averages.values()]
        for parts in self.pieces:
            w, g, m, v = (
                _load(storage, parts, room, copies=skip is not None)
                for storage, room in zip(storages, rooms, strict=True)
            )
            if scale is not None:
                g.mul_(scale)
            m.lerp_(g, 1 - self.cfg.beta1)
            v.mul_(self.cfg.beta2).addcmul_(g, g, value=1 - self.cfg.beta2)
            _store(storages[2], parts, m, skip)
            _store(storages[3], parts, v, skip)
            root = torch.sqrt(v, out=rooms[3][: v.numel()]).add_(constants.eps)
            if self.decays(parts[0].name):
                w.mul_(constants.decay)
            if isinstance(constants.size, Tensor):
                w.sub_(torch.mul(m, constants.size, out=rooms[2][: m.numel()]).div_(root))
            else:
                w.addcdiv_(m, root, value=-constants.size)
            if parts[0].name in keys:
                for part in parts:
                    into = drawn[part.at : part.at + part.run.numel].view(part.run.rows, part.run.cols)
                    into.copy_(rounding.bits(part.run, key=keys[part.name], device=w.device))
                rounding.round_(w, drawn[: w.numel()])
            _store(storages[0], parts, w, skip)


def _load(storage: dict[str, Tensor], parts: list[Part], room: Tensor, *, copies: bool) -> Tensor:
    """(N,) of all parts in the dtype of ``room``: the storage itself where it is one run of that, unless ``copies``."""
    run, whole = parts[0].run, storage[parts[0].name]
    if len(parts) == 1 and whole.dtype == room.dtype and run.pitch in (0, run.cols) and not copies:
        return run.of(whole).view(-1)
    for part in parts:
        into = room[part.at : part.at + part.run.numel]
        into.view(part.run.rows, part.run.cols).copy_(part.run.of(storage[part.name]))
    return room[: parts[-1].at + parts[-1].run.numel]


def _store(storage: dict[str, Tensor], parts: list[Part], x: Tensor, skip: Tensor | None) -> None:
    for part in parts:
        into = part.run.of(storage[part.name])
        if into.data_ptr() == x.data_ptr():
            return
        new = x[part.at : part.at + part.run.numel].view(part.run.rows, part.run.cols)
        into.copy_(new if skip is None else torch.where(skip, into.to(new.dtype), new))
