"""Communication balance loss (DeepSeek-V2, arXiv 2405.04434, eq. 29-31): every group receives as many tokens."""

import torch
from torch import Tensor

from moetrain import comm
from moetrain.config import UserError, config
from moetrain.moe.balance.device import by_group, check_divides, check_groups
from moetrain.moe.balance.switch import shares
from moetrain.moe.types import Balance, Routing, Tokens


@config(group="balance", name="communication")
class Communication(Balance):
    """G / (M * tokens) * sum_g n_g * sum_t P_tg: n_g tokens of the micro-batch go to group g, each counted once.

    M = ``max_groups`` is what a token may go to; ``router=group_limited`` keeps it.
    """

    coef: float = 0.02
    num_groups: int = 2
    max_groups: int = 1

    def __post_init__(self) -> None:
        check_groups(self.num_groups, name="communication")
        if not 1 <= self.max_groups <= self.num_groups:
            raise UserError(
                f"model.moe.balance.communication.max_groups={self.max_groups} of num_groups={self.num_groups}: "
                f"use 1 to {self.num_groups}"
            )

    def check(self, *, num_experts: int) -> None:
        check_divides(self.num_groups, name="communication", num_experts=num_experts)

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor:
        """() float; equals the number of tokens when each goes to M groups and all groups receive alike."""
        (T, E), G, ids_TK = routing.scores_TE.shape, self.num_groups, routing.ids_TK
        group_TK = torch.where(ids_TK < 0, G, ids_TK // (E // G)) if routing.ragged else ids_TK // (E // G)
        goes_TG = ids_TK.new_zeros(T, G + 1).scatter_(1, group_TK, 1)
        real = ids_TK.new_full((), T) if tokens.mask_T is None else tokens.mask_T.sum()
        counts = comm.all_reduce_(torch.cat([goes_TG.sum(0)[:G], real[None]]), group=tokens.group)
        f_G = counts[:G].to(routing.scores_TE.dtype) * G / (self.max_groups * counts[G].clamp_min(1))
        return (by_group(shares(routing, tokens.mask_T).sum(0), G) * f_G).sum()
