"""A whole training step of another library's OLMoE, on the batches of ours: what each of them has in common.

The optimizer's state is ours: float32 weights and float32 moments of AdamW, 12 bytes a parameter, and global norm
clipping. What a peer computes with is one of ``WEIGHTS``; every other choice is an axis that is searched.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moetrain.job import Config, Data

WEIGHTS = ("bf16 weights, float32 copies in AdamW", "float32 weights under autocast")


class MasterAdamW:
    """Fused AdamW on float32 copies of bf16 parameters."""

    def __init__(self, groups: list[dict[str, Any]], **constants: Any) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        own = []
        for group in groups:
            copies = [nn.Parameter(p.detach().float()) for p in group["params"]]
            self.pairs += zip(group["params"], copies, strict=True)
            own.append(group | {"params": copies})
        self.optimizer = torch.optim.AdamW(own, fused=True, **constants)

    @torch.no_grad()
    def step(self) -> None:
        for p, copy in self.pairs:
            copy.grad = None if p.grad is None else p.grad.float()
            p.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for p, copy in self.pairs:
            p.copy_(copy)

    def zero_grad(self) -> None:
        for p, _ in self.pairs:
            p.grad = None


class Stepper(ABC):
    """A model with its optimizer. ``axes``: what can be set, the first option being the start of the search."""

    axes: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(self, cfg: Config, device: torch.device, *, weights: str) -> None:
        assert weights in WEIGHTS, weights
        self.cfg, self.device = cfg, device
        self.mixed = mixed = weights == WEIGHTS[1]
        self.micro_batch, o = 1, cfg.optim
        self.model = self.build(cfg, dtype=torch.float32 if mixed else torch.bfloat16)
        self.model.train()
        self.context = torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        constants = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps}
        self.optimizer = (
            torch.optim.AdamW(groups, fused=True, **constants) if mixed else MasterAdamW(groups, **constants)
        )

    @abstractmethod
    def build(self, cfg: Config, *, dtype: torch.dtype) -> nn.Module:
        """The model on ``self.device``, its weights drawn."""

    @abstractmethod
    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """(B, S), (B, S) -> () the mean over tokens."""

    @abstractmethod
    def set(self, axis: str, option: str) -> None:
        """Raises, whatever its library raises, where the option cannot be had."""

    @abstractmethod
    def load(self, ours: dict[str, Tensor]) -> None:
        """Our weights, by our names: to show that it is the same model."""

    def step(self, data: Data, consumed: int) -> Tensor:
        """One optimizer step on the samples from ``consumed`` on; () the mean loss."""
        t = self.cfg.train
        total = torch.zeros((), device=self.device)
        for first in range(consumed, consumed + t.batch, self.micro_batch):
            batch = data.loader.batch(first, self.micro_batch)
            tokens, targets = (x.to(self.device, non_blocking=True) for x in (batch.tokens_BS, batch.targets_BS))
            with self.context:
                loss = self.loss(tokens, targets) * (self.micro_batch / t.batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def compiled(layers: list[nn.Module], option: str, device: torch.device) -> None:
    """Each layer by itself, as both libraries do it: the second is found compiled."""
    for layer in layers:
        if option == "no":
            layer._compiled_call_impl = None
        else:
            layer.compile(dynamic=False, backend="inductor" if device.type == "cuda" else "eager")
