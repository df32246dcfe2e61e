"""Device-level balance loss (DeepSeek-V2, arXiv 2405.04434, eq. 26-28): even load over groups of experts."""

from torch import Tensor

from moetrain import comm
from moetrain.config import UserError, config
from moetrain.layouts import divisors
from moetrain.moe.balance.switch import counted, shares
from moetrain.moe.types import Balance, Routing, Tokens


@config(group="balance", name="device")
class Device(Balance):
    """G * sum_g f_g * sum_t P_tg: f_g is group g's share of the micro-batch's assignments, P_tg its normalized scores.

    A group is a run of consecutive experts: part of the model, wherever they are.
    """

    coef: float = 0.05
    num_groups: int = 2

    def __post_init__(self) -> None:
        check_groups(self.num_groups, name="device")

    def check(self, *, num_experts: int) -> None:
        check_divides(self.num_groups, name="device", num_experts=num_experts)

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor:
        """() float; equals the number of tokens when load is even over groups."""
        load_E = comm.all_reduce_(routing.load_E.clone(), group=tokens.group)
        f_G = by_group(counted(load_E, routing), self.num_groups) / load_E.sum().clamp_min(1)
        return self.num_groups * (by_group(shares(routing, tokens.mask_T).sum(0), self.num_groups) * f_G).sum()


def by_group(x_E: Tensor, num_groups: int) -> Tensor:
    """(E,) -> (G,) sums over runs of E / G experts."""
    return x_E.view(num_groups, -1).sum(1)


def check_groups(num_groups: int, *, name: str) -> None:
    """Raise ``UserError`` for a number of groups that no model has."""
    if num_groups < 1:
        raise UserError(f"model.moe.balance.{name}.num_groups={num_groups}: has to be at least 1")


def check_divides(num_groups: int, *, name: str, num_experts: int) -> None:
    """Raise ``UserError`` for groups that are not of one size."""
    if num_experts % num_groups:
        raise UserError(
            f"model.moe.balance.{name}.num_groups={num_groups} does not divide model.moe.num_experts={num_experts}: "
            f"use one of {divisors(num_experts)}"
        )
