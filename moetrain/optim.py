"""AdamW on each rank's own shards, one global gradient norm, and the learning-rate schedules.

The optimizer works on the local storage of sharded parameters: elementwise updates need no collectives, and DTensor's
dispatch would cost several times the update itself. Its state is described, like everything, by global name.
"""

import math
from enum import Enum

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.config import UserError, config


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay (arXiv 2404.06395)


@config
class OptimConfig:
    """AdamW (arXiv 1711.05101). Norms and biases are never decayed; gates by choice."""

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    schedule: Schedule = Schedule.cosine
    warmup: int = 100
    decay: int | None = None  # steps of wsd's final decay; None = a tenth of the run
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_gates: bool = True
    clip: float = 1.0  # global gradient norm; 0 = do not clip

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optim.lr={self.lr}: the learning rate has to be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"optim.{name}={value}: has to be at least 0 and below 1")
        if self.clip < 0:
            raise UserError(f"optim.clip={self.clip}: a norm is not negative; 0 turns clipping off")

    def lr_at(self, step: int, *, steps: int) -> float:
        """Learning rate of step 0 .. steps - 1."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        floor = self.lr * self.min_lr_ratio
        if self.schedule is Schedule.constant:
            return self.lr
        if self.schedule is Schedule.cosine:
            done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
            return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))
        decay = self.decay if self.decay is not None else max(1, steps // 10)
        done = min(1.0, max(0.0, (step - (steps - decay)) / decay))
        return self.lr - (self.lr - floor) * done


class Optimizer:
    """torch's fused AdamW over local shards. ``params`` maps names to the storage that it updates in place."""

    def __init__(self, cfg: OptimConfig, params: dict[str, Tensor]) -> None:
        self.cfg = cfg
        self.leaves = {name: nn.Parameter(storage) for name, storage in params.items()}  # shares the storage
        decayed = [p for name, p in self.leaves.items() if self._decays(name)]
        others = [p for name, p in self.leaves.items() if not self._decays(name)]
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (cfg.beta1, cfg.beta2)
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], cfg.lr, betas, cfg.eps, fused=True)
        for p in self.leaves.values():  # made now: a checkpoint is loaded into it in place
            state = self.adamw.state[p]
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)

    def _decays(self, name: str) -> bool:
        if name.endswith(("norm.weight", ".bias")):
            return False
        return self.cfg.decay_gates or ".moe.gate." not in name

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], *, lr: float, scale: Tensor | None) -> None:
        """Update in place with ``scale * grads``; the fused kernel scales float32 gradients as it reads them."""
        values = list(grads.values())
        if scale is not None and values[0].dtype is torch.float32:
            self.adamw.grad_scale = scale.reciprocal().float()  # pyright: ignore[reportAttributeAccessIssue]
        elif scale is not None:  # the kernel's factor is float32, too coarse for float64
            torch._foreach_mul_(values, scale.to(values[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for name, p in self.leaves.items():
            p.grad = grads[name]
        self.adamw.step()
        self.adamw.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """exp_avg and exp_avg_sq -> name -> local storage."""
        return {k: {n: self.adamw.state[p][k] for n, p in self.leaves.items()} for k in ("exp_avg", "exp_avg_sq")}

    def set_steps(self, steps: int) -> None:
        """How many updates the state has seen (Adam's bias correction), after a checkpoint was loaded into it."""
        for p in self.leaves.values():
            self.adamw.state[p]["step"].fill_(steps)


@torch.no_grad()
def grad_norm(grads: list[Tensor], *, group: ProcessGroup | None, like: Tensor) -> Tensor:
    """() global norm of gradients whose every element lies on exactly one rank of ``group``. One all-reduce."""
    squares = torch.zeros((), dtype=torch.float64, device=like.device)
    if mine := [g for g in grads if g.numel()]:
        norms = torch._foreach_norm(mine)  # pyright: ignore[reportPrivateImportUsage]
        squares += torch.stack([n.double() for n in norms]).square().sum()
    return comm.all_reduce_(squares, group=group).sqrt()


def clip_scale(norm: Tensor, *, clip: float) -> Tensor | None:
    """What to multiply gradients by so that their norm is at most ``clip``; None if that is 0. No host sync."""
    return None if clip == 0 else (clip / (norm + 1e-6)).clamp(max=1.0)
