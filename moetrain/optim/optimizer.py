"""The optimizer of a rank: who updates which parameter, the global gradient norm, what of it is in a checkpoint.

It works on the local storage of sharded parameters: elementwise updates need no collectives, and DTensor's dispatch
would cost several times the update itself. Its state is described, like everything, by global name.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm, world
from moetrain.config import UserError
from moetrain.logical import Chunk, Logical
from moetrain.optim.adamw import AdamW
from moetrain.optim.config import Kind, OptimConfig
from moetrain.optim.muon import Muon

Describe = Callable[[str, Tensor], Logical]


def whole(name: str, box: Tensor) -> Logical:
    """Of a rank that is alone."""
    return Logical(tuple(box.shape), box.dtype, (Chunk((0,) * box.dim(), box),))


class Optimizer:
    """AdamW, or Muon for hidden matrices and AdamW for the rest. ``params`` maps names to storage that is updated.

    ``describe`` says which boxes of the whole parameter a storage holds; ``group`` is the ranks that hold all of them
    together: this rank's pipeline stage, in the same order of parameters. Collective where that is more than one.
    """

    def __init__(
        self,
        cfg: OptimConfig,
        params: dict[str, Tensor],
        *,
        describe: Describe = whole,
        group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        """``seed`` is the run's, for weights that are rounded stochastically."""
        self.cfg = cfg
        turned = [n for n, p in params.items() if kept(cfg, n, describe(n, p).shape) == ("momentum",)]
        self.muon = (
            Muon(cfg, {n: params[n] for n in turned}, describe=describe, group=group, seed=seed) if turned else None
        )
        others = {n: p for n, p in params.items() if n not in set(turned)}
        self.adamw = AdamW(cfg, others, decays=self._decays, describe=describe, seed=seed)

    def _decays(self, name: str) -> bool:
        if name.endswith(("norm.weight", ".bias")):
            return False
        return self.cfg.decay_gates or ".moe.gate." not in name

    @torch.no_grad()
    def step(
        self, grads: dict[str, Tensor], *, lr: float, scale: Tensor | None, skip: Tensor | None = None,
        step: int | None = None,
    ) -> None:  # fmt: skip
        """Update in place with ``scale * grads``; the gradients are used up, but those of frozen parameters. ``step``,
        of the run, is needed where weights are rounded.

        Where ``skip``, () bool, is true, it is as if there had been no step; a GPU's host does not wait to know.
        """
        if skip is not None and world.on_cpu(skip):
            if skip:
                return
            skip = None
        self.adamw.step(grads, lr=lr, scale=scale, skip=skip, step=step)
        if self.muon is not None:
            self.muon.step(grads, lr=lr * self.cfg.muon.lr_scale, scale=scale, skip=skip, step=step)

    @property
    def words(self) -> str:
        """Who computes updates, and why."""
        return ("Muon, and " if self.muon else "") + self.adamw.words

    @property
    def updates(self) -> int:
        """That the state has seen; the host waits to know."""
        return int(self.adamw.steps)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """exp_avg, exp_avg_sq, and momentum where there is one -> name -> local storage."""
        return self.adamw.averages | ({} if self.muon is None else {"momentum": self.muon.momentum})

    def replace(self, name: str, storage: Tensor) -> None:
        """From now on the parameter lies in ``storage``, its state in what ``state`` was given; then call ``moved``."""
        part = self.muon if self.muon is not None and name in self.muon.momentum else self.adamw
        part.replace(name, storage)

    def moved(self) -> None:
        """Every ``replace`` is done. Collective, like the making."""
        self.adamw.moved()
        if self.muon is not None:
            self.muon.moved()

    def set_steps(self, steps: int) -> None:
        """How many updates the state has seen (Adam's bias correction), after a checkpoint was loaded into it."""
        self.adamw.set_steps(steps)


def kept(cfg: OptimConfig, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The state that is kept of a parameter of that logical shape.

    Muon's are the hidden layers' matrices, the last two dimensions of them; a gate's only by choice, vectors never.
    """
    hidden = name.startswith("blocks.") and len(shape) > 1 and min(shape[-2:]) > 1
    gate = ".moe.gate." in name or ".shared.gate." in name
    turned = cfg.kind is Kind.muon and hidden and (cfg.muon.gates or not gate)
    return ("momentum",) if turned else ("exp_avg", "exp_avg_sq")


def check_saved(cfg: OptimConfig, saved: dict[str, tuple[tuple[int, ...], torch.dtype]], folder: Path) -> None:
    """Raises ``UserError`` where a checkpoint's optimizer state is not of the kind or dtype that ``cfg`` continues.

    ``saved`` is the checkpoint's index. Nothing is converted: another optimizer or dtype is another run.
    """
    found: dict[str, dict[str, torch.dtype]] = {}
    for full, (_, dtype) in saved.items():
        if full.startswith("optim."):
            state, _, name = full.removeprefix("optim.").partition(".")
            found.setdefault(name, {})[state] = dtype
    for name, states in found.items():
        if (weight := saved.get(f"model.{name}")) is None:
            continue
        wanted = kept(cfg, name, weight[0])
        if set(states) != set(wanted):
            raise UserError(
                f"{folder} keeps {', '.join(sorted(states))} of {name}, where optim.kind={cfg.kind.value} (optim.muon."
                f"gates={str(cfg.muon.gates).lower()}) keeps {', '.join(wanted)}: restore the optim.kind that it was "
                f"trained with, or start anew with another run.name"
            )
        dtype = cfg.dtype_of_state(weight[1])
        if other := [d for d in states.values() if d != dtype]:
            words, here = (str(d).removeprefix("torch.") for d in (other[0], dtype))
            raise UserError(
                f"{folder} has optimizer state in {words}, optim.state_dtype="
                f"{'null' if cfg.state_dtype is None else cfg.state_dtype.value} keeps it in {here}: set "
                f"optim.state_dtype={words} to continue it, or start anew with another run.name"
            )


@torch.no_grad()
def norm_and_sum(grads: list[Tensor], x: Tensor, *, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """() global norm of gradients whose every element lies on exactly one rank of ``group``, and the () sum of the
    ranks' ``x``, float64 both. One all-reduce."""
    squares = torch.zeros((), dtype=torch.float64, device=x.device)
    if mine := [g for g in grads if g.numel()]:
        norms = torch._foreach_norm(mine)  # pyright: ignore[reportPrivateImportUsage]
        squares += torch.stack([n.double() for n in norms]).square().sum()
    both = comm.all_reduce_(torch.stack([squares, x.double()]), group=group)
    return both[0].sqrt(), both[1]


def grad_norm(grads: list[Tensor], *, group: ProcessGroup | None, like: Tensor) -> Tensor:
    """The norm alone."""
    return norm_and_sum(grads, like.new_zeros(()), group=group)[0]


def clip_scale(norm: Tensor, *, clip: float) -> Tensor | None:
    """What to multiply gradients by so that their norm is at most ``clip``; None if that is 0. No host sync."""
    return None if clip == 0 else (clip / (norm + 1e-6)).clamp(max=1.0)
