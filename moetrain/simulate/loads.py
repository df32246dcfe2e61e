"""Where loads come from: a recorded run, or made up. All numbers follow from the seed.

A load is (steps, E) float64 whole numbers, the assignments of every expert in every step; each row sums to tokens * K.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from moetrain import counter
from moetrain.config import UserError, config
from moetrain.telemetry import load_trace
from moetrain.telemetry.load_trace import Recorded


@config
class Zipf:
    """The i-th hottest expert gets i^-exponent; which one that is, a permutation of each layer says, for good."""

    exponent: float = 1.0  # 0 = even
    steps: int = 200

    def __post_init__(self) -> None:
        if not (math.isfinite(self.exponent) and self.exponent >= 0):
            raise UserError(f"trace.exponent={self.exponent}: has to be 0 (even) or more")
        if self.steps < 1:
            raise UserError(f"trace.steps={self.steps}: has to be at least 1")

    def load(self, *, experts: int, top_k: int, tokens: int, layer: int, seed: int) -> Tensor:
        """(steps, E) of a layer."""
        hot_E = counted(torch.arange(1.0, experts + 1).double() ** -self.exponent, tokens=tokens, top_k=top_k)
        return torch.stack([hot_E[order_E.argsort()] for order_E in self.orders(experts, layer=layer, seed=seed)])

    def orders(self, experts: int, *, layer: int, seed: int) -> list[Tensor]:
        """Of each step (E,) the experts, the hottest first."""
        return [_shuffled(torch.arange(experts), "order", seed, layer)] * self.steps


@config
class Drift(Zipf):
    """Zipf whose hot experts wander: every so many steps a share of the permutation is shuffled."""

    every: int = 20  # steps
    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"trace.every={self.every}: steps from one change to the next, has to be at least 1")
        if not 0 <= self.share <= 1:
            raise UserError(f"trace.share={self.share}: the share of experts that change places, has to be in 0..1")

    def orders(self, experts: int, *, layer: int, seed: int) -> list[Tensor]:
        order_E = _shuffled(torch.arange(experts), "order", seed, layer)
        found = []
        for step in range(self.steps):
            if step and step % self.every == 0:
                places = _shuffled(torch.arange(experts), "places", seed, layer, step)[: round(self.share * experts)]
                order_E = order_E.clone()
                order_E[places] = order_E[places.roll(1)]  # everyone of them moves
            found.append(order_E)
        return found


TRACES: dict[str, type[Zipf]] = {"zipf": Zipf, "drift": Drift}


def recorded(path: Path, *, experts: list[int], top_k: list[int]) -> Recorded:
    """The trace of a run; raises ``UserError`` where it is of other MoE layers than the model has."""
    found = load_trace.read(path)
    for name, theirs, ours in (
        ("experts", [x.shape[1] for x in found.loads], experts),
        ("experts a token", found.top_k, top_k),
    ):
        if theirs != ours:
            raise UserError(
                f"trace={path} has {_brief(theirs)} {name}, the model {_brief(ours)}: give the model of that run, for "
                f"example --config its config.yaml"
            )
    return found


def counted(weight_E: Tensor, *, tokens: int, top_k: int) -> Tensor:
    """(E,) weights -> (E,) whole assignments as near to them as can be, that sum to tokens * top_k, none above tokens:
    a token's experts are distinct."""
    wanted_E, full_E = weight_E / weight_E.sum() * tokens * top_k, torch.zeros_like(weight_E, dtype=torch.bool)
    while (wanted_E > tokens).any():
        full_E |= wanted_E >= tokens
        rest = tokens * (top_k - int(full_E.sum()))
        free_E = weight_E * ~full_E
        wanted_E = torch.where(full_E, float(tokens), free_E / free_E.sum().clamp_min(1e-300) * rest)
    load_E = wanted_E.floor()
    missing = round(tokens * top_k - float(load_E.sum()))
    load_E[(wanted_E - load_E).argsort(descending=True, stable=True)[:missing]] += 1
    return load_E


def _shuffled(x: Tensor, *what: int | str) -> Tensor:
    return x[counter.uniform(torch.arange(len(x)), key=counter.key("loads", *what)).argsort()]


def _brief(numbers: list[int]) -> str:
    same = len(set(numbers)) == 1
    return f"{len(numbers)} MoE layers of {numbers[0]}" if same else f"MoE layers of {numbers}"
