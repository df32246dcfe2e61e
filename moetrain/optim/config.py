"""What an optimizer is told: its kind, its constants, the learning rate of every step, the dtype of its state."""

import math
from collections.abc import Iterable
from dataclasses import field
from enum import Enum
from fnmatch import fnmatchcase

import torch

from moetrain.config import UserError, config, nearest
from moetrain.logical import DTypeName


class Kind(Enum):
    adamw = "adamw"  # arXiv 1711.05101
    muon = "muon"  # for the matrices of hidden layers; AdamW for the rest


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay (arXiv 2404.06395)


class StateDType(DTypeName):
    float32 = "float32"
    bfloat16 = "bfloat16"


class UpdateKernel(Enum):
    auto = "auto"
    torch = "torch"
    triton = "triton"


@config
class MuonConfig:
    """Muon (Jordan et al. 2024) with updates of AdamW's size (arXiv 2502.16982), so that both share a learning rate."""

    momentum: float = 0.95  # Nesterov's
    ns_steps: int = 5  # Newton-Schulz iterations
    ns_dtype: StateDType | None = None  # what they compute in; None = as the weights. bfloat16 is faster on GPUs
    lr_scale: float = 1.0  # times optim.lr
    weight_decay: float | None = None  # None = optim.weight_decay
    gates: bool = False  # the routers' matrices too

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.muon.momentum={self.momentum}: has to be at least 0 and below 1; 0.95 is usual")
        if self.ns_steps < 1:
            raise UserError(f"optim.muon.ns_steps={self.ns_steps}: has to be at least 1; 5 is usual")
        if self.lr_scale <= 0:
            raise UserError(f"optim.muon.lr_scale={self.lr_scale}: has to be above 0; 1 is AdamW's learning rate")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UserError(
                f"optim.muon.weight_decay={self.weight_decay}: a decay is not negative; null takes optim.weight_decay"
            )


@config
class OptimConfig:
    """Norms and biases are never decayed; gates by choice. ``kind=muon`` leaves embeddings, head, norms, biases and
    gates to AdamW. ``freeze``: patterns of names (``*`` is any text, dots too) of parameters that stay as they are, and
    their state of the optimizer with them; the gradient norm is that of the others."""

    kind: Kind = Kind.adamw
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
    state_dtype: StateDType | None = None  # of averages and momentum; None = what the update is computed in
    weight_dtype: StateDType | None = None  # that weights are kept in; None = float32, or train.dtype where it is wider
    kernel: UpdateKernel = UpdateKernel.auto  # what computes AdamW's update
    muon: MuonConfig = field(default_factory=MuonConfig)
    freeze: list[str] = field(default_factory=list)

    def frozen(self, name: str) -> bool:
        """Whether the parameter of that global name is never updated."""
        return any(fnmatchcase(name, pattern) for pattern in self.freeze)

    def check_freeze(self, names: Iterable[str]) -> None:
        """Raise ``UserError`` for a pattern that none of the whole model's parameters match."""
        names = list(names)
        kinds = [".".join("*" if word.isdigit() else word for word in name.split(".")) for name in names]
        kinds = [kind.removeprefix("blocks.") for kind in kinds]  # "*.moe.gate.weight": every layer's
        for pattern in self.freeze:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"optim.freeze has {pattern!r}, which is the name of no parameter{nearest(pattern, kinds)} "
                    f"(* is any text; the first of {len(names)} is {names[0]!r})"
                )

    def dtype_of_state(self, weights: torch.dtype) -> torch.dtype:
        """That of averages and momentum of weights that are kept in ``weights``."""
        return torch.promote_types(weights, torch.float32) if self.state_dtype is None else self.state_dtype.torch

    def check_weights(self, compute: torch.dtype) -> None:
        """Raise ``UserError`` for weights that are kept in less than what the model computes in."""
        if self.weight_dtype is None:
            return
        kept, words = self.weight_dtype.torch, str(compute).removeprefix("torch.")
        if torch.promote_types(kept, compute) != kept:
            raise UserError(
                f"optim.weight_dtype={self.weight_dtype.value} with train.dtype={words}: weights are kept in no less "
                f"than what is computed in; set train.dtype={self.weight_dtype.value} or optim.weight_dtype=null"
            )

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optim.lr={self.lr}: the learning rate has to be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"optim.{name}={value}: has to be at least 0 and below 1")
        if self.clip < 0:
            raise UserError(f"optim.clip={self.clip}: a norm is not negative; 0 turns clipping off")
        if self.state_dtype is StateDType.bfloat16:
            fades = {"beta1": self.beta1, "beta2": self.beta2}
            if self.kind is Kind.muon:
                fades["muon.momentum"] = self.muon.momentum
            for name, value in fades.items():
                if 1 - value <= _HALF_STEP:
                    raise UserError(
                        f"optim.{name}={value} with optim.state_dtype=bfloat16: an average that fades by less than "
                        f"2^-8 a step is rounded back to where it was; use {name} <= 0.996 or state_dtype=float32"
                    )

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


_HALF_STEP = 2.0**-8
"""At most half the distance between neighbours in bfloat16, relative to them: what rounding to nearest can undo."""
